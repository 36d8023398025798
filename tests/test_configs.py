"""Every YAML that ships, and every example in docs/files.md, loads with the strict schema it is meant for."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

from evla_cli.calibration import load_samples
from evla_cli.checkpoint.files import read_yaml
from evla_cli.evaluation.candidates import CandidateList, ListedCandidate
from evla_cli.families.cogact import GivenByHand
from evla_cli.plan import LayerImportance, PrunePlan
from evla_cli.running import RunState
from evla_cli.schema import from_mapping
from evla_cli.settings import InferenceSettings, Recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "inference.yaml")
EVALUATED = sorted((ROOT / "configs" / "eval").glob("*.yaml"))
EVAL_RECIPES = [path for path in EVALUATED if "candidates" not in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads(path):
    recipe = Recipe.load(path)
    assert recipe.analyze is not None
    assert recipe.prune is not None
    assert recipe.export is not None


@pytest.mark.parametrize("path", [*RECIPES, *EVAL_RECIPES], ids=lambda path: path.name)
def test_recipe_names_every_saving_of_the_runtime(path):
    """Whatever the defaults are, or become."""
    settings = yaml.safe_load(path.read_text())["export"]["settings"]
    assert {"num_keep", "prune_layer"} <= settings["visual_tokens"].keys()
    assert "interval" in settings["action_cache"]
    assert {"num_denoise_steps", "cfg_scale"} <= settings["diffusion"].keys()


def test_the_papers_four_settings_ship():
    names = {path.stem for path in RECIPES}
    assert {f"cogact_l{layers}_t{tokens}" for layers in (28, 22) for tokens in (112, 56)} <= names


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith("cogact_l")], ids=lambda p: p.name)
def test_recipe_does_what_its_name_says(path):
    layers, tokens = map(int, re.fullmatch(r"cogact_l(\d+)_t(\d+)(?:_refit)?", path.stem).groups())
    recipe = Recipe.load(path)
    assert 32 - recipe.prune.drop_layers == layers
    assert recipe.prune.mlp_prune_ratio == 0.25
    settings = recipe.export.settings
    assert settings.visual_tokens.num_keep == tokens
    assert (settings.visual_tokens.num_key, settings.visual_tokens.task_ratio) == (4, 0.5)
    assert (settings.action_cache.interval, settings.diffusion.num_denoise_steps) == (5, 10)
    assert recipe.output.endswith(path.stem)


@pytest.mark.parametrize(("refit", "paper"), [("cogact_l22_t56_refit", "cogact_l22_t56"), ("demo_refit", "demo")])
def test_refit_recipes_have_the_papers_sizes(refit, paper):
    """Only how rows are chosen and whether layers are refit differ, and where things stand."""
    ours, theirs = (Recipe.load(ROOT / "configs" / f"{recipe}.yaml") for recipe in (refit, paper))
    assert ours.export == theirs.export
    assert (ours.prune.mlp_method, ours.prune.refit) == ("activation", True)
    assert replace(ours.prune, mlp_method=theirs.prune.mlp_method, refit=False) == theirs.prune


def test_what_is_recommended_prunes_the_towers_and_more_tokens_too():
    for recommended, refit, images in (
        ("cogact_recommended", "cogact_l22_t56_refit", 256),
        ("demo_recommended", "demo_refit", 64),
    ):
        ours, theirs = (Recipe.load(ROOT / "configs" / f"{recipe}.yaml") for recipe in (recommended, refit))
        assert ours.prune.vision_mlp_prune_ratio == 0.25
        assert replace(ours.prune, vision_mlp_prune_ratio=0.0) == theirs.prune  # no block of a tower goes
        assert ours.export.settings.visual_tokens.num_keep == 40 * images // 256
        kept = replace(ours.export.settings.visual_tokens, num_keep=theirs.export.settings.visual_tokens.num_keep)
        assert replace(ours.export.settings, visual_tokens=kept) == theirs.export.settings


def test_lists_of_candidates_load_and_name_what_a_recipe_makes():
    """Everything in configs/eval is one or the other."""
    recipes = set(EVAL_RECIPES)
    shipped = [ROOT / "configs" / f"{name}.yaml" for name in ("demo", "demo_refit", "demo_recommended")]
    made = {(path.parent / Recipe.load(path).output).resolve() for path in (*recipes, *shipped)}
    known = {path / "bundle" for path in made} | {ROOT / "demo" / "cogact-metaworld"}
    for path in set(EVALUATED) - recipes:
        listed = from_mapping(CandidateList, read_yaml(path), str(path))
        assert {(path.parent / candidate.checkpoint).resolve() for candidate in listed.candidates} <= known
        assert listed.candidates[0] == ListedCandidate("dense", "../../demo/cogact-metaworld")
    assert len(recipes) == 3


def test_table_has_the_papers_eight_rows():
    path = ROOT / "configs" / "eval" / "demo_table.yaml"
    rows = from_mapping(CandidateList, read_yaml(path), str(path)).candidates
    every = set(rows)
    *rows, refit, recommended = rows
    for row, recipe in ((refit, "demo_refit"), (recommended, "demo_recommended")):  # the settings of their bundles
        made = Recipe.load(ROOT / "configs" / f"{recipe}.yaml")
        assert (row.settings, Path(made.output).name) == (None, Path(row.checkpoint).parent.name)
        assert f"L={10 - made.prune.drop_layers}, T={made.export.settings.visual_tokens.num_keep}" in row.name
    methods = [row.settings.visual_tokens.method if row.settings else "none" for row in rows]
    assert methods == ["none", "random", "fastv", "vla_cache", *["evla"] * 4]
    for row in rows[4:]:
        layers, tokens = map(int, re.fullmatch(r"EfficientVLA \(L=(\d+), T=(\d+)\)", row.name).groups())
        recipe = "demo" if layers == 7 else f"eval/demo_l{layers}"
        made = Recipe.load(ROOT / "configs" / f"{recipe}.yaml")
        assert Path(made.output).name == Path(row.checkpoint).parent.name
        assert (10 - made.prune.drop_layers, made.prune.mlp_prune_ratio) == (layers, 0.25)
        assert (row.settings.visual_tokens.num_keep, row.settings.action_cache.interval) == (tokens, 5)
    headline = ROOT / "configs" / "eval" / "demo_headline.yaml"
    few = from_mapping(CandidateList, read_yaml(headline), str(headline)).candidates
    assert set(few) <= every
    assert [row.name.partition(" (")[0] for row in few] == ["dense", "EfficientVLA", "refit", "recommended"]


@pytest.mark.parametrize("name", ["table", "headline", "contrasts"])
def test_make_makes_every_bundle_that_it_evaluates(name):
    path = ROOT / "configs" / "eval" / f"demo_{name}.yaml"
    makefile = (ROOT / "Makefile").read_text()
    (commands,) = re.findall(rf"^eval-{name}:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    recipes = [ROOT / recipe for recipe in re.findall(r"evla run (\S+)", commands)]
    made = {(recipe.parent / Recipe.load(recipe).output / "bundle").resolve() for recipe in recipes}
    rows = from_mapping(CandidateList, read_yaml(path), str(path)).candidates
    asked = {(path.parent / row.checkpoint).resolve() for row in rows} - {ROOT / "demo" / "cogact-metaworld"}
    assert asked == made
    assert f"evla eval configs/eval/demo_{name}.yaml $(METAWORLD)" in commands


SECTIONS = {
    section: [key.name for key in fields(value)]
    for section, value in vars(InferenceSettings()).items()
    if is_dataclass(value)
}


def test_documented_settings_are_complete_and_neutral():
    path = ROOT / "configs" / "inference.yaml"
    assert InferenceSettings.load(path) == InferenceSettings()
    given = yaml.safe_load(path.read_text())
    assert {section: list(keys) for section, keys in given.items() if isinstance(keys, dict)} == SECTIONS


@pytest.fixture(scope="module")
def examples() -> dict[str, list[str]]:
    """The code blocks of docs/files.md by the title of their section."""
    text = (ROOT / "docs" / "files.md").read_text()
    sections = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {
        title: re.findall(r"^```\w+\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
        for title, body in zip(sections[1::2], sections[2::2], strict=True)
    }


@pytest.mark.parametrize(
    ("title", "load"),
    [
        ("importance.json", LayerImportance.load),
        ("prune_plan.yaml", PrunePlan.load),
        ("inference.yaml", InferenceSettings.load),
        ("Recipe", Recipe.load),
        ("run.json", RunState.load),
        ("Candidates", lambda path: from_mapping(CandidateList, read_yaml(path), str(path))),
    ],
)
def test_documented_example_loads(examples, title, load, tmp_path):
    (tmp_path / "file").write_text(examples[title][0])
    load(tmp_path / "file")


def test_documented_samples_load(examples, tmp_path):
    (tmp_path / "samples.jsonl").write_text(examples["Calibration samples"][0])
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0001.png").write_bytes(b"")
    assert load_samples(tmp_path, "image")[0].instruction == "open the drawer"


def test_documented_head_counts_are_understood(examples):
    entry = json.loads(examples["CogACT's run directory"][0])["evla"]
    heads = from_mapping(GivenByHand, entry, "config.json: evla").num_attention_heads
    assert set(heads) == {"dino", "siglip", "action_model"}


def test_every_key_of_the_schemas_is_documented():
    text = (ROOT / "docs" / "files.md").read_text()
    assert all(f"`{section}.{key}`" in text for section, keys in SECTIONS.items() for key in keys)
    hints = Recipe.__dataclass_fields__
    assert all(f"`{key}`" in text or f"`{key}." in text for key in hints)
