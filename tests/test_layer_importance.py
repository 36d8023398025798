"""Layer importance: streamed layer by layer, against a whole model with hooks and float64 arithmetic."""

import math

import numpy as np
import pico
import pytest
import torch
from transformers import AutoModelForCausalLM

from evla_cli import pipeline
from evla_cli.calibration import load_samples
from evla_cli.families import open_checkpoint
from evla_cli.methods.layer_importance import importance_and_error, sample_similarity
from evla_cli.models.processing import CogACTProcessor, load_tokenizer
from evla_cli.models.skeleton import load_model
from evla_cli.models.streaming import DecoderStream


def naive_similarities(layers, run_sample, num_samples):
    """(samples, layers): one unpadded sample at a time, cosines in float64, position by position."""
    table = np.zeros((num_samples, len(layers)))
    for number in range(num_samples):
        seen = {}

        def record(module, args, kwargs, output, seen=seen):
            inputs = args[0] if args else kwargs["hidden_states"]
            seen[layers.index(module)] = (inputs[0].double(), output[0].double())

        handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
        with torch.inference_mode():
            run_sample(number)
        for handle in handles:
            handle.remove()
        for index, (before, after) in seen.items():
            cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, after, strict=True)]
            table[number, index] = sum(cosines) / len(cosines)
    return table


def cogact_case(cogact_run, image_samples):
    checkpoint = open_checkpoint(cogact_run)
    model = load_model(checkpoint.family, checkpoint.config, checkpoint.weights, cogact_run)
    processor = CogACTProcessor(model.config, cogact_run)
    samples = load_samples(image_samples, "image")

    def run_sample(number):
        model(*processor([samples[number].image], [samples[number].instruction]).arguments())

    layers = list(model.language_model.model.layers)
    return cogact_run, image_samples, naive_similarities(layers, run_sample, len(samples))


def decoder_case(path, text_samples):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    tokenizer = load_tokenizer(path)
    samples = load_samples(text_samples, "text")

    def run_sample(number):
        model(input_ids=torch.tensor([tokenizer.encode(samples[number].text).ids]), use_cache=False)

    return path, text_samples, naive_similarities(list(model.model.layers), run_sample, len(samples))


@pytest.fixture(scope="module", params=["cogact", "gemma2", "llama"])
def case(request, cogact_run, decoders, image_samples, text_samples):
    """Source, samples, and their similarities (samples, layers)."""
    if request.param == "cogact":
        return cogact_case(cogact_run, image_samples)
    return decoder_case(decoders(request.param), text_samples)


def test_importance_equals_a_naive_computation_on_the_whole_model(case):
    """Batches hold samples of different lengths, so padding would show; so would the final norm on the last layer."""
    source, data, similarities = case
    found = pipeline.analyze(source, data, batch_size=3)
    expected = 1 - similarities.mean(axis=0)
    # Hidden states are float32 on both sides (eager and SDPA attention differ by rounding); cosines are of order 1.
    np.testing.assert_allclose([score.importance for score in found.layers], expected, rtol=0, atol=3e-6)
    assert expected.max() - expected.min() > 0.05  # layers that could not be told apart would prove nothing


def test_standard_error_equals_numpys(case):
    source, data, similarities = case
    found = pipeline.analyze(source, data, batch_size=3)
    expected = similarities.std(axis=0, ddof=1) / math.sqrt(len(similarities))
    np.testing.assert_allclose([score.standard_error for score in found.layers], expected, rtol=0, atol=3e-6)


def test_batch_size_does_not_matter(case):
    source, data, _ = case
    runs = [pipeline.analyze(source, data, batch_size=size) for size in (1, 5)]
    scores = [[score.importance for score in run.layers] for run in runs]
    # Matrix products of other shapes sum in another order: float32 rounding.
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=2e-6)
    assert runs[0].ranking() == runs[1].ranking()


def test_num_samples_takes_so_many(case):
    source, data, similarities = case
    kind = open_checkpoint(source).family.sample_kind
    places = {sample.where: number for number, sample in enumerate(load_samples(data, kind))}
    taken = [places[sample.where] for sample in load_samples(data, kind, 2)]
    assert len(set(taken)) == 2
    assert kind == "image" or taken == [0, 1]  # of texts the first
    found = pipeline.analyze(source, data, num_samples=2)
    expected = 1 - similarities[taken].mean(axis=0)
    np.testing.assert_allclose([score.importance for score in found.layers], expected, rtol=0, atol=3e-6)
    single = pipeline.analyze(source, data, num_samples=1)
    assert {score.standard_error for score in single.layers} == {None}


def test_each_layers_weights_are_loaded_once_and_then_dropped(decoders, text_samples):
    checkpoint = open_checkpoint(decoders("llama"))
    loads = []

    def counted(name, lazy):
        return type(lazy)(lazy.dtype, lazy.shape, lambda: (loads.append(name), lazy.load())[1])

    for name, lazy in list(checkpoint.weights.items()):
        checkpoint.weights[name] = counted(name, lazy)
    samples = load_samples(text_samples, "text")
    held = []
    with torch.inference_mode():
        stream = DecoderStream(checkpoint, samples, 2, torch.float32)
        for index, layer in enumerate(stream.layers()):
            layers = stream._layers
            held.append([not next(each.parameters()).is_meta for each in layers])
            assert held[-1] == [number == index for number in range(len(layers))]
            for batch in stream.batches:
                batch.hidden_states = layer(batch.hidden_states, **batch.arguments[index])
    of_layers = [name for name in loads if ".layers." in name]
    assert len(of_layers) == len(set(of_layers)) == len([n for n in checkpoint.weights if ".layers." in n])


def test_padding_takes_no_part_in_a_samples_mean():
    similarity = torch.tensor([[0.5, 0.25, 9.0], [0.1, 0.2, 0.3]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert sample_similarity(similarity, mask).tolist() == pytest.approx([0.375, 0.2], abs=1e-7)


def test_importance_is_one_minus_the_mean():
    assert importance_and_error([0.75, 0.25]) == (0.5, pytest.approx(0.25))
    assert importance_and_error([0.9]) == (pytest.approx(0.1), None)


def test_same_run_twice_gives_the_same_file(decoders, text_samples):
    runs = [pipeline.analyze(decoders("gemma2"), text_samples).to_json() for _ in range(2)]
    assert runs[0] == runs[1]


def test_pico_samples_differ_in_length(image_samples, text_samples):
    """What the tests above rely on."""
    assert len({len(text.split()) for text in pico.INSTRUCTIONS}) > 2
    assert len({len(sample.text.split()) for sample in load_samples(text_samples, "text")}) > 2
