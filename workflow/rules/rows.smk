# Priorities: a row is scored as soon as it is sampled, and the teacher's rows come before any
# training, as under DVC.
rule generate:
    input:
        code("generate"),
        drawn_by,
        params=unless_recorded("artifacts/samples/{row}.npz"),
    output:
        "artifacts/samples/{row}.npz",
        "artifacts/samples/{row}.json",
    log:
        "logs/generate/{row}.log",
    benchmark:
        "logs/benchmarks/generate/{row}.tsv"
    priority: 1
    threads: ALL_CORES
    resources:
        cpus_per_task=lambda wildcards, threads: threads,
        gpu=GPU,
        mem_mb=8000,
        runtime=240,
    params:
        tracked=tracked("rows.{row}", "generate", "network", "noise", "precision"),
    shell:
        "env PYTHONPATH=src python -m fewstep generate {wildcards.row} > {log} 2>&1"


rule fid:
    input:
        code("fid"),
        "artifacts/ref-stats.npz",
        "artifacts/ref-stats.json",
        "artifacts/samples/{row}.npz",
        "artifacts/samples/{row}.json",
        params=unless_recorded("artifacts/scores/{row}.json"),
    output:
        report(
            "artifacts/scores/{row}.json",
            caption="../report/score.rst",
            category=method_of,
            labels=labels_of("score"),
        ),
    log:
        "logs/fid/{row}.log",
    benchmark:
        "logs/benchmarks/fid/{row}.tsv"
    priority: 2
    threads: ALL_CORES
    resources:
        cpus_per_task=lambda wildcards, threads: threads,
        gpu=GPU,
        mem_mb=8000,
        runtime=120,
    params:
        tracked=tracked("metric"),
    shell:
        "env PYTHONPATH=src python -m fewstep fid {wildcards.row} > {log} 2>&1"
