rule results_table:
    input:
        code("results-table"),
        "artifacts/data.lmdb",
        "artifacts/ref-stats.json",
        expand("artifacts/samples/{row}.{kind}", row=config["rows"], kind=["npz", "json"]),
        expand("artifacts/scores/{row}.json", row=config["rows"]),
        expand(
            "artifacts/models/{model}/{file}",
            model=["teacher", *config["imports"], *config["students"]],
            file=["model.safetensors", "model.json", "log.jsonl"],
        ),
        expand(
            "artifacts/snapshots/{model}",
            model=["teacher", *config["imports"], *config["students"]],
        ),
        expand("artifacts/models/{model}@best", model=["teacher", *config["students"]]),
        params=unless_recorded("results/metrics.json"),
    output:
        report("results/metrics.json", caption="../report/metrics.rst", category="All models"),
        report("results/table.csv", caption="../report/table.rst", category="All models"),
        "results/table.md",
        "results/table.tex",
        report("results/report.html", caption="../report/page.rst", category="All models"),
        "results/provenance.json",
        report("results/samples.png", caption="../report/samples.rst", category="All models"),
        report(
            directory("results/grids"),
            patterns=["{row}.png"],
            caption="../report/grid.rst",
            category=method_of,
            labels=labels_of("samples"),
        ),
        report("results/losses.png", caption="../report/losses.rst", category="All models"),
        report(
            directory("results/losses"),
            patterns=["{student}.csv"],
            caption="../report/loss.rst",
            category=method_of,
            labels=labels_of("training loss"),
        ),
        directory("results/validation"),
    log:
        "logs/results-table.log",
    benchmark:
        "logs/benchmarks/results-table.tsv"
    threads: 1
    resources:
        cpus_per_task=1,
        mem_mb=4000,
        runtime=30,
    params:
        tracked=tracked(
            "data",
            "generate",
            "imports",
            "metric",
            "network",
            "noise",
            "precision",
            "rows",
            "seed",
            "students",
            "teacher",
        ),
    shell:
        "env PYTHONPATH=src python -m fewstep results-table > {log} 2>&1"
