"""`fewstep results-table`: all rows -> results/: tables, metrics, pictures and a page."""

from pathlib import Path

import yaml

from fewstep.data.lmdb import ImageDataset
from fewstep.files import read_json, write_json
from fewstep.params import Params
from fewstep.paths import DATA, RESULTS, STATS_ABOUT
from fewstep.report import facts
from fewstep.report.charts import loss_curves
from fewstep.report.frames import best_first, logs_frame, records, rows_frame
from fewstep.report.moments import moment_pictures
from fewstep.report.page import Content, write_page
from fewstep.report.pictures import draw_samples, neighbour_pictures, sample_pictures
from fewstep.report.published import published, with_published
from fewstep.report.tables import table_caption, write_curves, write_metrics, write_table
from fewstep.report.text import format_row

HELP = "collect all rows into results/"


def run(params: Params) -> None:
    about, d, students = read_json(STATS_ABOUT), params.data, list(params.students)
    others = published(about["metric"], d.resolution, d.classes, about["reference_file"])
    rows, logs = with_published(rows_frame(params.rows), others), logs_frame(students)
    caption, shown = table_caption(rows, about), records(rows)
    write_table(rows, RESULTS, caption)
    write_metrics(rows, about["floor"], RESULTS / "metrics.json")
    write_curves(logs, students, RESULTS)
    loss_curves(logs, students, RESULTS / "losses.png")

    dataset = ImageDataset(DATA)
    samples = sample_pictures(records(best_first(rows)), dataset, params.generate.images, d.classes)
    first = params.generate.first_seed
    last = first + len(samples[0].images) - 1
    seeds = f"Seeds {first} to {last}; one place is one seed and class"
    columns = samples[0].columns
    whole = d.classes > 1 and columns % d.classes == 0
    if dataset.class_names and whole and params.generate.labels == "balanced":
        start = first % d.classes
        names = (*dataset.class_names[start:], *dataset.class_names[:start])
        seeds += f"; columns: {', '.join(names)}" + (", again" if columns > d.classes else "")
    draw_samples(samples, RESULTS, seeds)

    runs = facts.provenance(params, params.rows)
    write_json(RESULTS / "provenance.json", runs)
    content = Content(
        title=f"Few-step samples of {Path(d.source).stem}, {d.resolution}×{d.resolution}",
        caption=caption,
        rows=rows,
        logs=logs,
        floor=about["floor"],
        samples=samples,
        samples_note=f"{seeds}. The slider goes from the best row to the worst.",
        moments=moment_pictures(students),
        neighbours=neighbour_pictures(shown, dataset),
        neighbours_note=facts.neighbours_note(params, about),
        provenance=facts.facts(params, about, shown[0], runs),
        records={name: facts.record(name, runs) for name in params.rows},
        configuration=yaml.safe_dump(facts.experiment(params), sort_keys=False, allow_unicode=True),
        published=others,
        class_names=dataset.class_names,
    )
    write_page(content, RESULTS / "report.html")
    print("\n".join(map(format_row, shown)))
    print(f"floor, real against real: {about['floor']['value']:.2f}")
    print(f"results: {RESULTS}/report.html, table.md, samples.png")
