# Downloads are verified by their sha256 in params.yaml, resumed and retried. On a cluster they run
# where Snakemake runs, because compute nodes seldom reach the internet.
rule download_teacher:
    input:
        code("download-teacher"),
        "artifacts/settings/teacher.json",
        "artifacts/data.lmdb",
        params=unless_recorded("artifacts/models/teacher/model.safetensors"),
    output:
        "artifacts/models/teacher/model.safetensors",
        "artifacts/models/teacher/model.json",
        "artifacts/models/teacher/log.jsonl",
        directory("artifacts/models/teacher@best"),
        directory("artifacts/snapshots/teacher"),
    log:
        "logs/download-teacher.log",
    benchmark:
        "logs/benchmarks/download-teacher.tsv"
    retries: 2
    localrule: "url" in config["teacher"]
    threads: ALL_CORES
    resources:
        cpus_per_task=lambda wildcards, threads: threads,
        gpu=GPU * ("train" in config["teacher"]),
        mem_mb=16000,
        runtime=1440,
    params:
        tracked=tracked("network", "data", "noise", "precision", "seed"),
    shell:
        "env PYTHONPATH=src python -m fewstep download-teacher > {log} 2>&1"


rule download_model:
    input:
        code("download-model"),
        params=unless_recorded("artifacts/models/{imported}/model.safetensors"),
    output:
        "artifacts/models/{imported}/model.safetensors",
        "artifacts/models/{imported}/model.json",
        "artifacts/models/{imported}/log.jsonl",
        directory("artifacts/snapshots/{imported}"),
    log:
        "logs/download-model/{imported}.log",
    benchmark:
        "logs/benchmarks/download-model/{imported}.tsv"
    retries: 2
    localrule: True
    threads: 1
    resources:
        cpus_per_task=1,
        mem_mb=16000,
        runtime=240,
    params:
        tracked=tracked("imports.{imported}", "network", "data"),
    shell:
        "env PYTHONPATH=src python -m fewstep download-model {wildcards.imported} > {log} 2>&1"


rule train:
    input:
        lambda wildcards: code(f"train-{config['students'][wildcards.student]['method']}"),
        "artifacts/settings/{student}.json",
        "artifacts/data.lmdb",
        "artifacts/models/teacher/model.safetensors",
        expand(
            "artifacts/models/{model}/model.safetensors",
            model=lookup(dpath="students/{student}/init_from", within=config),
        ),
        params=unless_recorded("artifacts/models/{student}/model.safetensors"),
    output:
        "artifacts/models/{student}/model.safetensors",
        report(
            "artifacts/models/{student}/model.json",
            caption="../report/model.rst",
            category=method_of,
            labels=labels_of("how it was trained"),
        ),
        "artifacts/models/{student}/log.jsonl",
        directory("artifacts/models/{student}@best"),
        directory("artifacts/snapshots/{student}"),
    log:
        "logs/train/{student}.log",
    benchmark:
        "logs/benchmarks/train/{student}.tsv"
    threads: ALL_CORES
    resources:
        cpus_per_task=lambda wildcards, threads: threads,
        gpu=GPU,
        mem_mb=16000,
        runtime=1440,
    params:
        tracked=tracked("network", "noise", "precision", "seed"),
    shell:
        "env PYTHONPATH=src python -m fewstep train {wildcards.student} > {log} 2>&1"
