"""Choosing layers: streamed, against whole models with layers really removed; the bootstrap against a plain one."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_refit import ridge_reference
from transformers import AutoModelForCausalLM

from evla_cli import pipeline
from evla_cli.calibration import hold_out, load_samples, sort_samples
from evla_cli.choosing import ChoiceOptions
from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.methods.layer_choice import Absorber, cheapest_runs, longest_run
from evla_cli.methods.refit import RIDGES
from evla_cli.methods.stability import RESAMPLES, SEED, exchanged_share, stability
from evla_cli.models.processing import CogACTProcessor, load_tokenizer
from evla_cli.models.skeleton import load_model
from evla_cli.plan import LayerImportance, PrunePlan
from evla_cli.running import run_recipe
from evla_cli.runtime.actions import sample_actions
from evla_cli.settings import ActionCacheSettings, DiffusionSettings

RUN_METHODS = [
    ("iterative", "hidden"),
    ("refit-aware", "hidden"),
    ("cosine", "action"),
    ("iterative", "action"),
    ("refit-aware", "action"),
]


def choose(source, data, dest, method, objective="hidden", num_drop=2, **options) -> dict:
    """The plan's `how`, and what was dropped."""
    chosen = {key: options.pop(key) for key in ("batch_size", "memory_budget", "num_samples") if key in options}
    options = {"num_drop": num_drop, "overwrite": True} | options
    pipeline.prune(source, dest, choice=ChoiceOptions(method, objective, data, **{"batch_size": 2} | chosen), **options)
    plan = PrunePlan.load(dest / "prune_plan.yaml")
    return plan.how | {"dropped": plan.dropped_layers}


# Whole models in float64, one unpadded sample at a time


class Naive:
    """`states(dropped)`: for every sample what each layer that is left sees, and in the end gives; and the output."""

    def __init__(self, source, data, held_out_last=False):
        self.checkpoint = open_checkpoint(source)
        family = self.checkpoint.family
        self.samples = sort_samples(load_samples(data, family.sample_kind))
        if held_out_last:
            fit_to, judging = hold_out(self.samples, data)
            self.samples = fit_to + judging
        if family.name == "decoder":
            load = {"dtype": torch.float64, "attn_implementation": "eager"}
            self.model = AutoModelForCausalLM.from_pretrained(source, **load).eval()
            self.decoder = self.model.model
            tokenizer = load_tokenizer(source)
            tokens = [torch.tensor([tokenizer.encode(sample.text).ids]) for sample in self.samples]
            self.calls = [lambda ids=ids: self.decoder(input_ids=ids, use_cache=False)[0] for ids in tokens]
        else:
            checkpoint = self.checkpoint
            self.model = load_model(family, checkpoint.config, checkpoint.weights, source, dtype=torch.float64)
            self.decoder = self.model.language_model.model
            processor = CogACTProcessor(self.model.config, checkpoint.tokenizer_dir)
            inputs = [processor([sample.image], [sample.instruction]) for sample in self.samples]
            inputs = [given.to(torch.empty(0, dtype=torch.float64)).arguments() for given in inputs]
            self.calls = [lambda given=given: self.model(*given) for given in inputs]
        self.layers = list(self.decoder.layers)

    @torch.inference_mode()
    def states(self, dropped=(), samples=None):
        kept = [layer for number, layer in enumerate(self.layers) if number not in dropped]
        self.decoder.layers = torch.nn.ModuleList(kept)
        self.decoder.config.num_hidden_layers = len(kept)
        found = []
        for number in range(len(self.samples)) if samples is None else samples:
            seen = []

            def record(_, args, kwargs, output, seen=seen):
                before = args[0] if args else kwargs["hidden_states"]
                seen.append((before[0], (output if torch.is_tensor(output) else output[0])[0]))

            inner = []
            handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in kept]
            handles += [
                layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, inner=inner: inner.append(args[0][0]))
                for layer in kept
            ]
            output = self.calls[number]()[0]
            for handle in handles:
                handle.remove()
            found.append((seen, inner, output))
        self.decoder.layers = torch.nn.ModuleList(self.layers)
        self.decoder.config.num_hidden_layers = len(self.layers)
        return found

    def importance(self, dropped):
        """By layer that is left: mean over samples of 1 - mean cosine over positions."""
        left = [layer for layer in range(len(self.layers)) if layer not in dropped]
        table = [
            [1 - float(torch.cosine_similarity(before, after, dim=-1).mean()) for before, after in seen]
            for seen, _, _ in self.states(dropped)
        ]
        return dict(zip(left, np.mean(table, axis=0), strict=True))

    @torch.inference_mode()
    def actions(self, dropped=()):
        cognition = torch.stack([output for _, _, output in self.states(dropped)])
        config = self.model.config.action_config
        shape = (len(self.samples), config.action_horizon, config.action_dim)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return sample_actions(self.model.action_head, cognition, noise, DiffusionSettings(), ActionCacheSettings())


@pytest.fixture(scope="module", params=["cogact", "mistral", "llama"])
def source(request, cogact_run, decoders, image_samples, text_samples):
    if request.param == "cogact":
        return cogact_run, image_samples
    return decoders(request.param), text_samples


def test_iterative_equals_removing_and_measuring_again(source, tmp_path):
    """Four of six layers, so that passes begin at the start and at layer 4."""
    model, data = source
    naive = Naive(model, data)
    how = choose(model, data, tmp_path / "out", "iterative", num_drop=4, protect_first=0)
    dropped = []
    for step in how["layer_choice"]["rounds"]:
        expected = naive.importance(dropped)
        assert list(step["scores"]) == list(expected)
        # Hidden states are float32 on one side; cosines are of order 1.
        np.testing.assert_allclose(list(step["scores"].values()), list(expected.values()), rtol=0, atol=3e-6)
        dropped.append(min(expected, key=lambda layer: expected[layer]))
        assert step["dropped"] == dropped[-1:]
    assert how["dropped"] == tuple(sorted(dropped))
    assert how["layer_choice"]["passes"] < sum(len(step["scores"]) for step in how["layer_choice"]["rounds"]) / 6 + 1e-9


@pytest.mark.parametrize("method", ["cosine", "iterative"])
def test_action_equals_removing_and_acting(cogact_run, image_samples, tmp_path, method):
    naive = Naive(cogact_run, image_samples)
    dense, dropped = naive.actions(), [3]
    how = choose(cogact_run, image_samples, tmp_path / "out", method, "action", num_drop=3, drop_ids=[3])
    rounds = how["layer_choice"]["rounds"]
    for step in rounds:
        expected = {
            layer: float((naive.actions([*dropped, layer]) - dense).abs().mean())
            for layer in (2, 4, 5)
            if layer not in dropped
        }
        assert list(step["scores"]) == list(expected)
        # Ten denoising steps in float32 on one side; the changes are of order 0.1.
        np.testing.assert_allclose(list(step["scores"].values()), list(expected.values()), rtol=0, atol=1e-4)
        dropped += sorted(expected, key=lambda layer: expected[layer])[: len(step["dropped"])]
    assert how["dropped"] == tuple(sorted(dropped))
    assert len(rounds) == (1 if method == "cosine" else 2)


@pytest.mark.parametrize("model_type", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_refit_aware_equals_refitting_whole_models(decoders, text_samples, tmp_path, model_type):
    """Every run by numpy's least squares, every single removal by a model with that layer gone and that weight changed,
    every set of layers by adding up."""
    naive, num_layers = Naive(decoders(model_type), text_samples, held_out_last=True), 6
    dense = naive.states()
    states = [  # by layer and sample: the input of layer j, or what the last one gives
        [seen[j][0] if j < num_layers else seen[-1][1] for seen, _, _ in dense] for j in range(num_layers + 1)
    ]
    errors, alone = {}, {}
    for i, j in itertools.combinations(range(-1, num_layers + 1), 2):
        if not 2 <= j - i <= 3:
            continue
        outputs, changes = states[max(i, -1) + 1], {None: 0.0}
        if i >= 0:
            inputs = [inner[i].numpy() for _, inner, _ in dense]
            rows, lacking = (
                np.vstack(values[:4])
                for values in (inputs, [(a - b).numpy() for a, b in zip(states[j], outputs, strict=False)])
            )
            changes |= {ridge: ridge_reference(rows, lacking, ridge) for ridge in RIDGES}
        given = {
            ridge: outputs[4].numpy() + (inputs[4] @ change.T if ridge else 0.0) for ridge, change in changes.items()
        }
        target = states[j][4].numpy()
        if j - i == 3 and i >= 0:  # the nearest run has settled lambda
            given = {ridge: given[ridge] for ridge in (None, alone[i + 1][0])}
        relative = {
            ridge: (np.square(found - target).sum(axis=1) / np.square(target).sum(axis=1)).mean()
            for ridge, found in given.items()
        }
        best = min(relative, key=relative.__getitem__)
        errors[i, j] = relative[best]
        if j - i == 2:
            if i >= 0:
                weight = naive.layers[i].mlp.down_proj.weight
                before = weight.data.clone()
                weight.data += torch.as_tensor(changes[best]) if best else 0.0
            output, expected = naive.states([i + 1], [4])[0][2], dense[4][2]
            if i >= 0:
                weight.data.copy_(before)
            moved = ((output - expected).square().sum(dim=1) / expected.square().sum(dim=1)).mean()
            alone[i + 1] = (best, float(moved))
    how = choose(decoders(model_type), text_samples, tmp_path / "out", "refit-aware")
    found = how["layer_choice"]["rounds"][0]
    assert dict(found["ridge"].items()) == {n: ridge for n, (ridge, _) in alone.items()}
    for layer, (_, moved) in alone.items():
        # Float32 on one side; the least ridge magnifies rounding 1e4 times.
        assert found["scores"][layer] == pytest.approx(moved, rel=2e-3)
        assert found["relative_error"][layer] == pytest.approx(errors[layer - 1, layer + 1], rel=2e-3)

    def cost(pair):
        a, b = pair
        if b == a + 1:
            return alone[b][1] * errors[a - 1, b + 1] / errors[b - 1, b + 1]
        return alone[a][1] + alone[b][1]

    assert how["dropped"] == min(itertools.combinations(range(num_layers), 2), key=cost)


def test_refit_aware_leaves_no_longer_gap_than_it_can_judge(decoders, text_samples, tmp_path):
    """Three layers in a row that do nothing cost nothing; of 6 layers two in a row may go."""
    source = shutil.copytree(decoders("llama"), tmp_path / "source")
    [file] = source.glob("*.safetensors")
    weights = load_file(file)
    for layer in (2, 3, 4):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"].zero_()
    save_file(weights, file, {"format": "pt"})
    dropped = choose(source, text_samples, tmp_path / "out", "refit-aware", num_drop=3)["dropped"]
    assert len({2, 3, 4} & set(dropped)) == 2
    assert choose(source, text_samples, tmp_path / "out", "iterative", num_drop=3)["dropped"] == (2, 3, 4)


@pytest.mark.parametrize("num_inputs", [12, 60])  # fewer inputs than the 40 rows, and more
def test_an_absorber_equals_solving_for_the_weight(num_inputs):
    generator = torch.Generator().manual_seed(num_inputs)
    inputs, judging = (torch.randn(rows, num_inputs, generator=generator) for rows in (40, 15))
    outputs, start = (torch.randn(rows, 5, generator=generator) for rows in (40, 15))
    law = torch.randn(num_inputs, 5, generator=generator)
    absorber = Absorber(inputs, judging, outputs, start)
    settled = None
    for noise in (1.0, 2.0):
        near, far = (rows @ law + noise * torch.randn(len(rows), 5, generator=generator) for rows in (inputs, judging))
        changes = {ridge: ridge_reference(inputs.numpy(), (near - outputs).numpy(), ridge) for ridge in RIDGES}
        candidates = {None: start.numpy()}
        candidates |= {ridge: start.numpy() + judging.numpy() @ change.T for ridge, change in changes.items()}
        if settled is not None:
            candidates = {ridge: candidates[ridge] for ridge in (None, settled)}
        lengths = np.square(far.numpy()).sum(axis=1)
        best = min(candidates, key=lambda n: (np.square(candidates[n] - far.numpy()).sum(axis=1) / lengths).sum())
        np.testing.assert_allclose(absorber.best(near, far), candidates[best], rtol=0, atol=1e-3)  # float32 products
        assert absorber.ridge == best
        settled = best
    assert settled is not None


def test_cheapest_runs_equals_trying_all_sets():
    random = np.random.default_rng(0)
    num_layers, num_drop = 8, 4
    costs = {(i, j): random.random(50) for i, j in itertools.combinations(range(-1, 9), 2) if 1 < j - i <= 5}
    for forced, protected in (((), ()), ((2,), ()), ((2, 7), (0, 1))):
        allowed = {run: cost for run, cost in costs.items() if not set(range(run[0] + 1, run[1])) & set(protected)}
        found = cheapest_runs(allowed, num_layers, num_drop, forced)
        for row in range(50):

            def total(dropped, row=row):
                kept = [-1, *(layer for layer in range(num_layers) if layer not in dropped), num_layers]
                return sum(costs[run][row] for run in itertools.pairwise(kept) if run[1] - run[0] > 1)

            sets = itertools.combinations([n for n in range(num_layers) if n not in protected], num_drop)
            best = min((dropped for dropped in sets if set(forced) <= set(dropped)), key=total)
            assert tuple(found[row].nonzero()[0]) == best
    with pytest.raises(ValueError, match="do not remove 4 of 8"):
        cheapest_runs({run: cost for run, cost in costs.items() if run[0] > 4}, num_layers, num_drop)


@pytest.mark.parametrize(
    ("num_layers", "num_drop", "removable", "forced", "expected"),
    [
        (30, 8, range(30), (), 5),
        (32, 10, range(2, 32), (), 6),
        (30, 3, range(30), (), 3),  # all in one run
        (10, 3, range(2, 10), (), 2),
        (10, 7, range(2, 10), (), 4),  # 7 of 8 in a row: one stays, in the middle
        (10, 8, range(2, 10), (), 8),
        (30, 8, range(30), range(4, 11), 7),  # named ones
    ],
)
def test_a_run_is_at_most_a_sixth_of_the_layers_or_what_it_takes(num_layers, num_drop, removable, forced, expected):
    assert longest_run(num_layers, num_drop, removable, forced) == expected


# How sure a choice is


def values(num_samples=7):
    """Layers 1 and 2 differ by less than their samples do."""
    random = np.random.default_rng(3)
    return np.array([0.5, 0.2, 0.21, 0.8, 0.05]) + 0.03 * random.standard_normal((num_samples, 5))


def test_the_bootstrap_equals_a_plain_one():
    table, count = values(), 7
    counts = np.random.default_rng(SEED).multinomial(count, [1 / count] * count, RESAMPLES)
    dropped = dict.fromkeys(range(5), 0)
    exchanged = 0
    for drawn in counts:
        rows = [row for row, times in enumerate(drawn) for _ in range(times)]
        means = [float(np.mean(table[rows, layer])) for layer in range(5)]
        for layer in sorted((0, 1, 2, 4), key=lambda layer: means[layer])[:2]:
            dropped[layer] += 1
        exchanged += means[2] < means[1]
    found = stability(table, dropped=[1, 4], candidates=[0, 1, 2, 4])
    assert found is not None
    assert (found["last_dropped"], found["first_kept"], found["told_apart"]) == (1, 2, False)
    assert found["exchanged_share"] == pytest.approx(exchanged / RESAMPLES)
    assert 0.05 < exchanged / RESAMPLES < 0.5
    assert found["drop_shares"] == pytest.approx({layer: dropped[layer] / RESAMPLES for layer in (0, 1, 2, 4)})


def test_clear_choices_are_told_apart_and_no_choice_says_nothing():
    found = stability(values(), dropped=[4], candidates=range(5))
    assert found is not None
    assert found["told_apart"]
    assert found["exchanged_share"] == 0.0
    assert stability(values(1), [4], range(5)) is None
    assert stability(values(), [], range(5)) is None
    assert exchanged_share(np.ones(4), np.ones(4)) == 0.0  # of equal layers the choice is never the other one


def test_samples_are_drawn_for_both_layers_at_once():
    """Layers that rise and fall together differ by the same in every sample: that is no doubt."""
    together = 10 * np.random.default_rng(0).standard_normal((20, 1)) + np.array([[0.0, 0.01]])
    found = stability(together, [0], [0, 1])
    assert found is not None
    assert found["drop_shares"] == {0: 1.0, 1: 0.0}


def test_a_plan_by_rank_says_how_sure_it_is(decoders, text_samples, tmp_path):
    file = tmp_path / "importance.json"
    found = pipeline.analyze_to_file(decoders("llama"), text_samples, file)
    table = np.array([score.per_sample for score in found.layers]).T
    np.testing.assert_allclose(table.mean(axis=0), [score.importance for score in found.layers], rtol=0, atol=1e-8)
    assert LayerImportance.load(file) == found
    assert max(len(line) for line in file.read_text().splitlines()) > 60  # numbers of a list share a line
    result = pipeline.prune(decoders("llama"), tmp_path / "out", importance=file, num_drop=2, drop_ids=[0])
    expected = stability(table, set(result.plan.dropped_layers) - {0}, range(1, 6))
    assert result.plan.how["stability"] == expected
    assert "layer_method" not in result.plan.how  # the default: files are what they were
    assert PrunePlan.load(tmp_path / "out/prune_plan.yaml").how["stability"] == expected


def test_files_of_older_versions_still_choose(decoders, text_samples, tmp_path):
    file = tmp_path / "importance.json"
    pipeline.analyze_to_file(decoders("llama"), text_samples, file)
    new = pipeline.prune(decoders("llama"), tmp_path / "new", importance=file, num_drop=2).plan
    record = json.loads(file.read_text())
    for layer in record["layers"]:
        del layer["per_sample"]
    file.write_text(json.dumps(record))
    old = pipeline.prune(decoders("llama"), tmp_path / "old", importance=file, num_drop=2).plan
    assert old.keep_layers == new.keep_layers
    assert "stability" in new.how
    assert "stability" not in old.how
    record["layers"][1]["per_sample"] = [0.1, 0.2]
    file.write_text(json.dumps(record))
    with pytest.raises(EvlaError, match="Layer 1 has 2 per_sample values for 5 samples"):
        LayerImportance.load(file)


# What must hold for all of them


@pytest.mark.slow
@pytest.mark.parametrize(("method", "objective"), RUN_METHODS)
def test_batches_budgets_and_threads_do_not_matter(cogact_run, image_samples, tmp_path, method, objective):
    def run(**options):
        return choose(cogact_run, image_samples, tmp_path / "out", method, objective, **options)

    expected = run()
    again = run()
    assert again == expected  # to the last bit
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        others = [run(batch_size=1), run(batch_size=5, memory_budget="0.001KB"), run()]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert other["dropped"] == expected["dropped"]
        for ours, theirs in zip(other["layer_choice"]["rounds"], expected["layer_choice"]["rounds"], strict=True):
            assert ours["scores"] == pytest.approx(theirs["scores"], rel=5e-3, abs=1e-5)  # float32, other shapes


@pytest.mark.parametrize(("method", "objective"), RUN_METHODS[:2])
def test_named_layers_go_and_protected_ones_stay(cogact_run, image_samples, tmp_path, method, objective):
    out = tmp_path / "out"
    how = choose(cogact_run, image_samples, out, method, objective, num_drop=3, drop_ids=[5], protect_first=3)
    assert how["dropped"] == (3, 4, 5)
    how = choose(cogact_run, image_samples, out, method, objective, num_drop=1, drop_ids=[2])
    assert how["dropped"] == (2,)
    with pytest.raises(EvlaError, match="is protected"):
        choose(cogact_run, image_samples, out, method, objective, drop_ids=[1])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "objective"), RUN_METHODS)
def test_a_layer_that_overflows_aborts(cogact_run, image_samples, tmp_path, method, objective):
    run = shutil.copytree(cogact_run, tmp_path / "run")
    file = run / "checkpoints/pico.pt"
    weights = torch.load(file)
    weights["model"]["llm_backbone"]["llm.model.layers.3.mlp.down_proj.weight"].fill_(3e38)
    torch.save(weights, file)
    with pytest.raises(EvlaError, match="Layer 3 gives NaN or infinite"):
        choose(run, image_samples, tmp_path / "out", method, objective)
    with pytest.raises(EvlaError, match="Layer 3 has the importance nan"):
        pipeline.analyze(run, image_samples)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_a_sample_did_not_reach_has_no_score():
    for similarities in ([], [0.5, 0.25]):
        with pytest.raises(EvlaError, match=f"Layer 3 was reached by {len(similarities)} of 5 samples"):
            pipeline._layer_score(3, similarities, [], 5)
    with pytest.raises(EvlaError, match="finite"):
        pipeline._layer_score(3, [0.5, float("nan")], [], 2)


# Positions


def test_importance_by_kind_of_position(cogact_run, image_samples):
    naive = Naive(cogact_run, image_samples)
    found = pipeline.analyze(cogact_run, image_samples, batch_size=3)
    weighted = pipeline.analyze(cogact_run, image_samples, batch_size=3, weights={"visual": 0.5, "cognition": 20.0})
    states = naive.states()
    for layer in range(6):
        cosines = [torch.cosine_similarity(*seen[layer], dim=-1) for seen, _, _ in states]  # [BOS] [16 visual] [text]
        kinds = {
            "visual": [float(values[1:17].mean()) for values in cosines],
            "text": [float(torch.cat((values[:1], values[17:-1])).mean()) for values in cosines],
            "cognition": [float(values[-1]) for values in cosines],
        }
        expected = {kind: 1 - np.mean(values) for kind, values in kinds.items()}
        assert found.layers[layer].by_modality == pytest.approx(expected, abs=3e-6)
        total = [
            (8 * visual + (len(values) - 17) * text + 20 * cognition) / (8 + len(values) - 17 + 20)
            for values, visual, text, cognition in zip(cosines, *kinds.values(), strict=True)
        ]
        assert weighted.layers[layer].importance == pytest.approx(1 - np.mean(total), abs=3e-6)
    assert weighted.position_weights == {"visual": 0.5, "cognition": 20.0}
    ones = pipeline.analyze(cogact_run, image_samples, batch_size=3, weights={"text": 1.0})
    assert [s.importance for s in ones.layers] == pytest.approx([s.importance for s in found.layers], abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"vision": 2.0}, "no kind 'vision'"),
        ({"visual": -1.0}, "from 0 on"),
        ({"visual": 0.0, "text": 0.0, "cognition": 0.0}, "nothing would be measured"),
    ],
)
def test_weights_that_mean_nothing(cogact_run, image_samples, weights, message):
    with pytest.raises(EvlaError, match=message):
        pipeline.analyze(cogact_run, image_samples, weights=weights)


# From the outside


def test_commands(cogact_run, image_samples, text_samples, decoders, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli, list(map(str, arguments)))

    file, dest = tmp_path / "importance.json", tmp_path / "out"
    result = run("analyze", cogact_run, "--samples", image_samples, "-o", file, "--position-weight", "cognition=20")
    assert result.exit_code == 0
    assert "cognition" in result.stdout
    assert "Positions count: cognition 20" in result.stdout
    options = ["--drop-layers", 2, "--samples", image_samples, "--quiet"]
    result = run("prune", cogact_run, dest, *options, "--layer-method", "iterative", "--objective", "action")
    assert result.exit_code == 0, result.output
    assert "dropped in" in result.stdout
    assert "bootstrap resamples" in result.stdout
    result = run("prune", cogact_run, dest, "--importance", file, "--drop-layers", 2, "--dry-run", "--json")
    assert set(json.loads(result.stdout)["plan"]["how"]["stability"]) >= {"exchanged_share", "told_apart"}
    again = run("prune", cogact_run, tmp_path / "again", "--plan", dest / "prune_plan.yaml")
    assert again.exit_code == 0
    first, second = (PrunePlan.load(path / "prune_plan.yaml") for path in (dest, tmp_path / "again"))
    assert first == second

    llama, other = decoders("llama"), tmp_path / "no"
    dropping, texts = ("prune", llama, other, "--drop-layers", 1), ("--samples", text_samples)
    for arguments, message in (
        ((*dropping, "--layer-method", "iterative"), "give both, or neither"),
        ((*dropping, *texts), "give both, or neither"),
        ((*dropping, *texts, "--objective", "action"), "no action head"),
        (("prune", llama, other, "--plan", file, "--layer-method", "iterative"), "leave out --layer-method"),
        ((*dropping, *texts, "--num-samples", 1, "--layer-method", "refit-aware"), "at least 2 samples"),
        (
            ("prune", decoders("gemma2"), *dropping[2:], *texts, "--layer-method", "refit-aware"),
            "a norm after the MLP",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code != 0
        assert message in " ".join(result.output.split())
    assert not other.exists()


@pytest.mark.slow
def test_with_refit_only_held_out_samples_judge(cogact_run, image_samples, tmp_path):
    from evla_cli.refitting import RefitOptions

    how = choose(cogact_run, image_samples, tmp_path / "out", "cosine", "action", refit=RefitOptions(image_samples))
    assert how["layer_choice"]["num_judging"] == how["refit_report"]["num_held_out"] == 1
    how = choose(cogact_run, image_samples, tmp_path / "out", "cosine", "action")
    assert how["layer_choice"]["num_judging"] == 5


def test_a_recipe(cogact_run, image_samples, tmp_path):
    recipe = {
        "schema_version": 1,
        "source": str(cogact_run),
        "output": "out",
        "analyze": {"samples": str(image_samples), "batch_size": 2, "position_weights": {"cognition": 5}},
        "prune": {"drop_layers": 2, "layer_method": "refit-aware", "objective": "action", "refit": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert [done for _, _, done in run_recipe(path)] == [True, True]
    how = PrunePlan.load(tmp_path / "out/pruned/prune_plan.yaml").how
    assert (how["layer_method"], how["objective"], how["refit"]) == ("refit-aware", "action", True)
    assert LayerImportance.load(tmp_path / "out/importance.json").position_weights == {"cognition": 5.0}
    for key, value in (("layer_method", "best"), ("objective", "luck")):
        path.write_text(yaml.safe_dump(recipe | {"prune": recipe["prune"] | {key: value}}))
        with pytest.raises(EvlaError, match=f"{key}: unknown value '{value}'"):
            run_recipe(path)
    del recipe["analyze"]
    recipe["prune"] = {"drop_layers": 2, "layer_method": "iterative"}
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(EvlaError, match="layer_method needs calibration samples"):
        run_recipe(path)
