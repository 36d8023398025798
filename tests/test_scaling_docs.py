"""docs/scaling.md is what its script says, and the script's bytes and operations are those of real models."""

from collections.abc import Callable

import make_scaling_docs as scaling
import pytest
import torch
from test_flops import parameters, skeleton
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from evla_cli.evaluation.flops import count_flops
from evla_cli.settings import InferenceSettings


def test_the_page_is_up_to_date():
    assert scaling.PATH.read_text(encoding="utf-8") == scaling.render()


def test_parameters_of_cogact_base():
    model = skeleton()
    layers = list(model.language_model.model.layers)
    assert scaling.COGACT.num_layers == len(layers)
    assert scaling.COGACT.layer_parameters() == sum(weight.numel() for weight in layers[0].parameters())
    assert scaling.COGACT.parameters == parameters(model)


def test_operations_before_the_decoder_of_cogact_base():
    flops = count_flops(skeleton(), InferenceSettings(), convention="full")
    assert scaling.COGACT.other_flops == pytest.approx(flops.vision + flops.projector, rel=0.05)


@pytest.mark.parametrize("num_key_value_heads", [8, 2])
def test_operations_are_those_that_torch_counts(num_key_value_heads):
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=160,
        vocab_size=32,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).model
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=torch.zeros(1, 20, 64), use_cache=False)
    decoder = scaling.Decoder("tiny", 64, 3, 8, num_key_value_heads, 160, 32 * 64, 0.0)
    assert decoder.flops(20) == counter.get_total_flops()
    assert decoder.parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("stage", [scaling.prune_seconds, scaling.export_seconds])
def test_a_faster_disk_never_takes_longer(stage: Callable[..., float]):
    assert stage(scaling.COGACT, scaling.GPUS) < stage(scaling.COGACT, scaling.SMALL)
    assert stage(scaling.COGACT, scaling.SMALL) < stage(scaling.LLAMA_70B, scaling.SMALL)
