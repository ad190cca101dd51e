"""The numbers in the README's sentences are those of the tracked metrics and benchmarks."""

import json

import pytest

from benchmarks import measure
from dive_lib import paths
from dive_lib.files import read_csv, read_json
from dive_lib.wording import interval

METRICS = paths.ROOT / "reports" / "mini" / "metrics"


def metrics(name: str) -> dict:
    return read_json(METRICS / f"{name}.json")


def benchmark(name: str, key: str) -> dict[str, dict]:
    return {row[key]: row for row in read_json(measure.RESULTS / f"{name}.json")["rows"]}


def gain(value: float, ends: list[float], digits: int = 1, sign: str = "") -> str:
    """3.7 [1.2, 6.5]"""
    return f"{value:{sign}.{digits}f} {interval(ends, digits)}"


def loss(value: float, ends: list[float], digits: int = 1) -> str:
    return gain(0 - value, [0 - ends[1], 0 - ends[0]], digits)  # 0 - 0 has no sign


def points(text: str) -> str:
    """3.7 points [1.2, 6.5]"""
    return text.replace(" [", " points [", 1)


def ap_loss(row: dict, kind: str = "AP") -> str:
    return loss(row["against_dive"][f"{kind}_difference"], row["against_dive"][f"{kind}_difference_ci95"])


def ap_gain(row: dict) -> str:
    return gain(row["against_dive"]["AP_difference"], row["against_dive"]["AP_difference_ci95"], sign="+")


def two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def detection() -> dict[str, str]:
    rows, steps, stopping = metrics("ablation"), metrics("steps"), read_csv(METRICS / "early_stopping.csv")
    dive, best, kept = rows["dive"], rows["dive_best_search"], rows["monitored_in_vocabulary"]
    detectors, first = metrics("detectors"), rows["without_prior"]["against_without_in_vocabulary"]
    constant = best["AP_constant_score"] - dive["AP_constant_score"]
    low, high = best["against_dive"]["AP_difference_ci95"]
    ranked = metrics("layout_prior")["share_worse"]
    assert ranked["duplicated"] == 1 and ranked["empty"] == 0
    saved = {row["patience"]: float(row["saving"]) for row in stopping}
    lost = {row["patience"]: dive["AP"] - float(row["AP"]) for row in stopping}
    half = min(saved, key=lambda patience: abs(saved[patience] - 0.5))
    found = [gain(row["AP"], row["AP_ci95"]) for row in
             (detectors[name] for name in ("synthetic_data", "diffusion_feature", "supervised"))]
    return {
        "Table III": f"falls by {points(ap_loss(rows['without_in_vocabulary']))} without in-vocabulary search, by "
                     f"{ap_loss(rows['without_prior'])} without the prior and by {ap_loss(rows['without_both'])} "
                     f"without both (AP50: " + ", ".join(
                         ap_loss(rows[name], "AP50")
                         for name in ("without_in_vocabulary", "without_prior", "without_both")) + ")",
        "Table III, the order": f"AP is {points(loss(first['AP_difference'], first['AP_difference_ci95']))} below that "
                                "without in-vocabulary search",
        "the prior's ranking": f"ranks {ranked['shuffled']:.0%} of held-out layouts before a copy with exchanged "
                               f"coordinates, all before one with an object twice, {ranked['wrong_class']:.0%} before "
                               "one with a wrong class, and none before the empty one".replace("%", " %"),
        "decoupled priors": f"({ap_gain(rows['decoupled_prior'])} on {rows['decoupled_prior']['n_images']} images; in",
        "local search": f"by {low:.0f} to {high:.0f} points of AP on the test images",
        "local search, constant scores": f"with constant ones it is {constant:.1f} points in place of "
                                         f"{best['AP'] - dive['AP']:.1f}",
        "continuous gradient": f"({ap_gain(kept)} on {kept['n_images']} images)",
        "Table I": f"({steps['75']['AP']:.1f} after 75 steps, {steps['115']['AP']:.1f} after 115)",
        "early stopping": f"but half of them only for {lost[half]:.0f} points of AP",
        "detectors": f"reaches an AP of {found[0]}, one on its features {found[1]}, one trained on real images "
                     f"{found[2]}",
    }


def classification() -> dict[str, str]:
    rows, found = metrics("classification"), benchmark("class_searches", "search")
    outside, fast = rows["dive_without_in_vocabulary"], rows["dive_fast"]
    once, every = fast["forward_equivalents_once"], rows["diffusion_classifier"]["forward_equivalents"]

    def pays(method: str) -> str:
        return two_digits(once / (rows[method]["forward_equivalents"] - fast["forward_equivalents"]))

    eps, times, slower = (found[name] for name in ("published_eps", "all_timesteps", "without_in_vocabulary_rate_0.3"))
    return {
        "outside the vocabulary": f"costs DIVE {-outside['difference_to_published']:.0f} points of classification "
                                  + interval([-end for end in outside["difference_to_published_ci95"][::-1]], digits=0),
        "the cheapest way": f"needs {fast['forward_equivalents']:.0f} forward-equivalents",
        "what its map costs": f"for what enumerating {two_digits(once / every)} images costs, once: that pays from "
                              f"{pays('diffusion_classifier')} images on beside the enumeration, "
                              f"{pays('diffusion_classifier_adaptive')} beside the one that drops classes early, "
                              f"{pays('dive_exact')} beside DIVE with exact reuse",
        "outside the vocabulary, slower": f"with a third of it, {slower['difference']:.0f} points come back",
        "published settings": f"the published eps costs {points(loss(eps['difference'], eps['difference_ci95']))}, all "
                              f"timesteps {loss(times['difference'], times['difference_ci95'])}",
    }


def searches() -> dict[str, str]:
    now, before = benchmark("searches", "search"), benchmark("searches_before", "search")

    def of(name: str, show=loss, rows: dict = now) -> str:
        return show(rows[name]["difference"], rows[name]["difference_ci95"])

    def ap(*names: str, rows: dict = now) -> list[str]:
        return [f"{rows[name]['AP']:.1f}" for name in names]

    variants = benchmark("architecture_ablation", "variant")

    def aid(name: str) -> tuple[float, list[float]]:
        return variants[name]["difference"], variants[name]["difference_ci95"]

    weights = ap("prior_weight_1", "prior_weight_0", "straight_through")
    noises = ap("local", "local_independent_noises")
    short, longer = (gain(now[name]["difference"], now[name]["difference_ci95"], sign="+")
                     for name in ("decoupled_priors", "decoupled_priors_trained_as_long"))
    return {
        "decoupled priors, trained longer": f"is {longer} in place of {short}",
        "the prior's weight": f"AP is {weights[0]} with the weight 1, {weights[1]} without a prior, "
                              f"{weights[2]} with 0.3",
        "opposite noises": f"its AP is {noises[0]} with them and {noises[1]} without",
        "opposite noises, DIVE": f"To DIVE they give {points(of('opposite_noises', gain))}",
        "all searches": f"with the mean difference to DIVE's {weights[2]} on the same images",
        "better searches": f"The local search finds more, {of('local', gain)}; with a straight-through run after it, "
                           f"for two fifths more evaluations, {of('local_then_straight_through', gain)}",
        "more steps": f"nor do 190 steps in place of 115, for three fifths more evaluations, "
                      f"{of('straight_through_190_steps', gain)}; larger",
        "more steps than Table I": f"with 190 steps AP is {points(of('straight_through_190_steps', gain))} higher",
        "two aids": f"is {points(gain(*aid('without_position_attention')))} higher, without the second "
                    f"{gain(*aid('without_field_dropout'))}, of one training each; without the linear map of the "
                    f"condition it is {loss(*aid('without_linear_condition'))} lower",
        "larger batches": f"larger batches in fewer steps cost {of('larger_batches')}",
        "weights": f"Without a prior there is less, {of('prior_weight_0')}, with the paper's weight of 1 as well, "
                   f"{of('prior_weight_1')}, with a weight of 0.1 too, {of('prior_weight_0.1')}, with summed losses "
                   f"far less, {of('summed_losses')}",
        "what is changed": f"makes a difference, {of('illegal_boxes_allowed')}; timesteps from coarse to fine, "
                           f"{of('not_coarse_to_fine')}, leaving out the ends of their range, {of('all_timesteps')}, "
                           f"and a larger rate and eps, {of('smaller_rate_and_eps')}, make none",
        "as published": f"leave {ap('as_published')[0]} points of AP",
        "fewer images": f"DIVE had {ap('straight_through', rows=before)[0]}, and timesteps from coarse to fine seemed "
                        f"to bring {of('not_coarse_to_fine', rows=before)}",
    }


def vermouth() -> dict[str, str]:
    few, sketches, pixels = metrics("few_shot"), metrics("sketch_retrieval"), metrics("segmentation")
    head, scratch = few["digits"]["u_head"]["16"], few["digits"]["beyond_scratch"]["16"]
    untrained, retrieval = few["ablations"]["backbone untrained_dit"], sketches["digits"]
    copy = sketches["ablations"][f"backbone untrained_{sketches['chosen']['backbone']}"]
    times = [value / retrieval["u_head"]["chance"]
             for value in (retrieval["u_head"]["mAP"], *retrieval["u_head"]["mAP_ci95"])]
    found, test = pixels["ablations"], pixels["scenes/test"]
    rise = metrics("features")["fixed_noise_rise"]

    def of(row: dict, show=gain, digits: int = 1) -> str:
        return show(row["difference"], row["difference_ci95"], digits)

    return {
        "few-shot": f"it is {points(of(head))} above a linear probe",
        "few-shot, from scratch": f"({gain(scratch['difference'], scratch['difference_ci95'], sign='+')};",
        "few-shot, untrained": f"on an untrained DiT it is {points(of(untrained, loss))} below",
        "sketches": f"at {times[0]:.2f} times chance {interval(times[1:], digits=2)}",
        "sketches, untrained": f"{points(of(copy, loss))} better than on its untrained copy, "
                               f"{of(retrieval['pixels'], loss)} better than by raw pixels",
        "sketches, head": f"the head adds {of(retrieval['without_head'], loss)}",
        "pixels": f"reach {test['mIoU_unseen']:.1f} points of mIoU {interval(test['mIoU_unseen_ci95'])}, "
                  f"with the same head on raw pixels {found['backbone pixels']['mIoU_unseen']:.1f} and on an "
                  f"untrained copy {found['backbone untrained_layout_ldm']['mIoU_unseen']:.1f}. That is "
                  f"{gain(test['ratio'], test['ratio_ci95'], 2)} of the {test['mIoU_seen']:.1f}",
        "pixels, raw": f"on raw pixels it is {found['backbone pixels']['ratio']:.2f}",
        "fixed noise": f"by {points(of(rise['layout_ldm']['fixed noise'], digits=0))}, but by "
                       f"{of(rise['untrained_layout_ldm']['fixed noise'], digits=0)} in the untrained copy",
        "no noise": f"gains {points(of(rise['layout_ldm']['no noise']))} and its copy nothing",
    }


SENTENCES = {**detection(), **classification(), **searches(), **vermouth()}


@pytest.mark.parametrize("about", SENTENCES)
def test_the_readme_says_what_was_measured(about):
    text = " ".join((paths.ROOT / "README.md").read_text().split())
    assert SENTENCES[about] in text, f"{about}: README.md should say {json.dumps(SENTENCES[about])}"
