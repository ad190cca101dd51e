"""Vermouth's part of the report: its section of metrics.json and its table in the README."""

from collections.abc import Mapping
from statistics import fmean

from dive_lib import vermouth_paper
from dive_lib.wording import in_words, interval

STAGES = ("features", "few_shot", "sketch_retrieval", "segmentation")
"""Metrics files of the notebooks 15 to 18."""

PROBES = {"classification": ("accuracy", "linear probe: the class of a photo"),
          "retrieval": ("mAP", "features as they are: photos of a sketch's class, mAP"),
          "segmentation": ("mIoU", "linear probe: the class of a pixel, mIoU")}
"""Granularity in the metrics of `15_features` -> its measure and the name of its row."""


def section(parts: Mapping) -> dict:
    """metrics["vermouth"] from the content of those metrics files that were written; without the paper's numbers."""
    own = {name: {key: value for key, value in part.items() if key not in ("paper", "ablations")}
           for name, part in parts.items() if name in STAGES[1:]}
    if "features" in parts:
        features = parts["features"]
        own |= {"probe_best": features["probe_best"], "probe_control": features["control"],
                "probe_backbones": features["backbones"]}
    ablations = {name: parts[name]["ablations"] for name in STAGES if "ablations" in parts.get(name, {})}
    return own | ({"ablations": ablations} if ablations else {})


def rows(metrics: Mapping) -> list[dict]:
    """Rows of the table from the content of metrics.json, {name, value, interval, beside, images, paper}.

    Of several data sets the first is shown; the notebooks show all.
    """
    part, found = metrics.get("vermouth", {}), []
    for granularity, (measure, name) in PROBES.items():
        if "probe_best" not in part:
            break
        row, others = part["probe_best"][granularity], part["probe_backbones"]
        backbone = next(key for key, own in others.items() if own[granularity] == row)
        beside = [f"{in_words(key)} {others[key][granularity][measure]:.1f}" for key in others if key != backbone]
        beside += [f"chance {row['chance']:.1f}"] if "chance" in row else []
        found.append({"name": f"{in_words(backbone)}, {name} (t = {row['t']}, {row['stage']})", "value": row[measure],
                      "interval": row[f"{measure}_ci95"], "beside": ", ".join(beside),
                      "images": row.get("n_images", row.get("queries")), "paper": ""})
    if "few_shot" in part:
        (methods,) = [own for key, own in part["few_shot"].items() if key != "chosen"][:1]
        most = max(methods["u_head"], key=int)
        beside = [f"best linear probe {methods['linear_probe'][most]['accuracy']:.1f}",
                  f"network from scratch {methods['from_scratch'][most]['accuracy']:.1f}",
                  *_same_head(part, "few_shot", "accuracy")]
        name = f"{_backbone(part['few_shot']['chosen'].get('u_head'))}few-shot classification, {most} shots"
        found.append(_row(name, methods["u_head"][most], "accuracy", beside,
                          f"{fmean(vermouth_paper.FEW_SHOT['Vermouth']):.1f} (mean of 11 sets)"))
    if "sketch_retrieval" in part:
        (methods,) = [own for key, own in part["sketch_retrieval"].items() if key != "chosen"][:1]
        beside = [f"its features without a head {methods['without_head']['mAP']:.1f}",
                  *_same_head(part, "sketch_retrieval", "mAP"), f"raw pixels {methods['pixels']['mAP']:.1f}",
                  f"chance {methods['u_head']['chance']:.1f}"]
        name = f"{_backbone(part['sketch_retrieval']['chosen'])}sketch retrieval, unseen classes, mAP"
        found.append(_row(name, methods["u_head"], "mAP", beside,
                          f"{vermouth_paper.RETRIEVAL['Vermouth'][0]:.1f} ({vermouth_paper.RETRIEVAL_SETS[0]})"))
    if "segmentation" in part:
        (row,) = [own for key, own in part["segmentation"].items() if key != "chosen"][:1]
        published = f"{vermouth_paper.SEGMENTATION['Vermouth'][0]:.1f} ({vermouth_paper.SEGMENTATION_SETS[0]})"
        # Where no name is set aside as unseen, as in the public sets, all are one group.
        for kind in [kind for kind in ("seen", "unseen") if f"mIoU_{kind}" in row] or ["all"]:
            beside = [f"{row['ratio']:.2f} of the seen ones"] if kind == "unseen" and "ratio" in row else []
            beside += _same_head(part, "segmentation", f"mIoU_{kind}", "backbone pixels")
            name = f"{_backbone(part['segmentation']['chosen'])}open-vocabulary segmentation, {kind} names, mIoU"
            found.append(_row(name, row, f"mIoU_{kind}", beside, published))
        own = row.get("handicapped", {})
        if "ratio" in own and part["segmentation"]["chosen"].get("handicap", 1):  # one of 0 changes nothing
            beside = [f"{own['ratio']:.2f} of the seen ones, then {own['mIoU_seen']:.1f}"]
            found.append(_row("the same, seen names handicapped", own, "mIoU_unseen", beside, ""))
    return found


def table(metrics: Mapping) -> str:
    """The README's Markdown table; empty where nothing of Vermouth was run."""
    header = ["what the frozen model is asked", "percent [95 % interval]", "beside it", "images", "paper, other data"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows(metrics):
        cells = [row["name"], f"**{row['value']:.1f}** {interval(row['interval'])}", row["beside"],
                 f"{row['images']:,}", row["paper"] or "\N{EN DASH}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _backbone(chosen: Mapping | None) -> str:
    """Whose features a head reads, as the beginning of its row's name."""
    return f"{in_words(chosen['backbone'])}, " if chosen else ""


def _row(name: str, row: Mapping, measure: str, beside: list[str], paper: str) -> dict:
    return {"name": name, "value": row[measure], "interval": row[f"{measure}_ci95"], "beside": ", ".join(beside),
            "images": row.get("n_images", row.get("queries")), "paper": paper}


def _same_head(part: Mapping, task: str, measure: str, *more: str) -> list[str]:
    """The same head on the other denoisers and on untrained ones, and in `more` rows, as far as the task's notebook has
    such rows."""
    rows = part.get("ablations", {}).get(task, {})
    return [f"the same head on {in_words(name.removeprefix('backbone '))} {row[measure]:.1f}"
            for name, row in rows.items()
            if name.startswith("backbone ") and (name in more or name != "backbone pixels")]
