# A download is verified by its sha256 in params.yaml, resumed where it stopped, and tried again; on
# a cluster it runs where Snakemake runs, since compute nodes seldom reach the internet.
rule download_teacher:
    input:
        code(
            "averages.py",
            "batch.py",
            "data/batches.py",
            "data/lmdb.py",
            "denoiser.py",
            "denoising.py",
            "download.py",
            "ema.py",
            "interop/*.py",
            "losses.py",
            "methods.py",
            "models.py",
            "noise.py",
            "norms.py",
            "optimizer.py",
            "stages/download_model.py",
            "stages/download_teacher.py",
            "stages/import_checkpoint.py",
            "train.py",
            "unet.py",
        ),
        "artifacts/data.lmdb",
        params=unless_recorded("artifacts/models/teacher/model.safetensors"),
    output:
        "artifacts/models/teacher/model.safetensors",
        "artifacts/models/teacher/model.json",
        "artifacts/models/teacher/log.jsonl",
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
        tracked=tracked("teacher", "network", "data", "noise", "precision", "seed"),
    shell:
        "env PYTHONPATH=src python -m fewstep download-teacher > {log} 2>&1"


rule download_model:
    input:
        code(
            "denoiser.py",
            "download.py",
            "interop/*.py",
            "models.py",
            "stages/download_model.py",
            "stages/import_checkpoint.py",
            "unet.py",
        ),
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
        code(
            "averages.py",
            "batch.py",
            "consistency.py",
            "data/batches.py",
            "data/lmdb.py",
            "denoiser.py",
            "denoising.py",
            "dmd2.py",
            "ema.py",
            "losses.py",
            "methods.py",
            "models.py",
            "noise.py",
            "norms.py",
            "optimizer.py",
            "solve.py",
            "train.py",
            "unet.py",
        ),
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
        tracked=tracked("students.{student}", "network", "noise", "precision", "seed"),
    shell:
        "env PYTHONPATH=src python -m fewstep train {wildcards.student} > {log} 2>&1"
