"""The pipeline's commands, a thin module each: read params, call the library, write the outputs."""
