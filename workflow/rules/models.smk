# A download is verified by params' sha256, resumed where it stopped, and tried again; on a cluster
# it runs where Snakemake runs, since compute nodes seldom reach the internet.
rule download_teacher:
    input:
        code(
            "batch.py",
            "denoiser.py",
            "denoising.py",
            "download.py",
            "ema.py",
            "interop/edm_pickle.py",
            "losses.py",
            "models.py",
            "noise.py",
            "stages/download_teacher.py",
            "train.py",
            "unet.py",
        ),
        "artifacts/data.lmdb",
        params=unless_recorded("artifacts/models/teacher/model.safetensors"),
    output:
        "artifacts/models/teacher/model.safetensors",
        "artifacts/models/teacher/model.json",
    log:
        "logs/download-teacher.log",
    benchmark:
        "benchmarks/download-teacher.tsv"
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


rule train:
    input:
        code(
            "batch.py",
            "checkpoint.py",
            "consistency.py",
            "data/batches.py",
            "data/lmdb.py",
            "denoiser.py",
            "denoising.py",
            "distributed.py",
            "dmd2.py",
            "ema.py",
            "losses.py",
            "models.py",
            "noise.py",
            "solve.py",
            "train.py",
            "unet.py",
        ),
        "artifacts/data.lmdb",
        "artifacts/models/teacher/model.safetensors",
        "artifacts/models/teacher/model.json",
        expand(
            "artifacts/models/{model}/model.safetensors",
            model=lookup(dpath="students/{student}/init_from", within=config),
        ),
        params=unless_recorded("artifacts/models/{student}/model.safetensors"),
    output:
        "artifacts/models/{student}/model.safetensors",
        "artifacts/models/{student}/model.json",
        "artifacts/models/{student}/log.csv",
    log:
        "logs/train/{student}.log",
    benchmark:
        "benchmarks/train/{student}.tsv"
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
