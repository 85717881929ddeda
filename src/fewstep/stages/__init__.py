"""The pipeline's commands, one thin module each.

`HELP` is the line in `fewstep --help`, and `run(params, ...)` calls the library and writes the
outputs. With TAKES_PATH, `run` gets the path of params.yaml instead. `NAME` describes the one name
that a command takes; `arguments` adds any other arguments to the parser.
"""
