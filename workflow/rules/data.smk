rule build_lmdb:
    input:
        code("build-lmdb"),
        source(),
        params=unless_recorded("artifacts/data.lmdb"),
    output:
        "artifacts/data.lmdb",
        "artifacts/data.json",
    log:
        "logs/build-lmdb.log",
    benchmark:
        "logs/benchmarks/build-lmdb.tsv"
    threads: 1
    resources:
        cpus_per_task=1,
        mem_mb=4000,
        runtime=120,
    params:
        tracked=tracked("data"),
    shell:
        "env PYTHONPATH=src python -m fewstep build-lmdb > {log} 2>&1"


rule ref_stats:
    input:
        code("ref-stats"),
        "artifacts/data.lmdb",
        params=unless_recorded("artifacts/ref-stats.npz"),
    output:
        "artifacts/ref-stats.npz",
        "artifacts/ref-stats.json",
    log:
        "logs/ref-stats.log",
    benchmark:
        "logs/benchmarks/ref-stats.tsv"
    threads: ALL_CORES
    resources:
        cpus_per_task=lambda wildcards, threads: threads,
        gpu=GPU,
        mem_mb=8000,
        runtime=60,
    params:
        tracked=tracked("metric", "generate.images"),
    shell:
        "env PYTHONPATH=src python -m fewstep ref-stats > {log} 2>&1"
