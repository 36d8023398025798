"""`check.json`: a bundle acts once where it is written, and `evla verify` has it act again and compares."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import evla, evla_error, evla_json
from transformers.models.llama.modeling_llama import LlamaAttention

from evla_cli import load_policy, pipeline
from evla_cli.bundling import verify_bundle
from evla_cli.checkpoint.tensors import LazyTensor, load_finite
from evla_cli.comparison import compare_checkpoints
from evla_cli.errors import CheckFailed, EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.runtime.action_check import ActionCheck, fixed_image

Record = dict[str, Any]


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def change(directory: Path, edit: Callable[[Record], Any]) -> None:
    path = directory / "check.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def move(record: Record, distance: float) -> None:
    record["denoised_action"][3][6] += distance


# What is written


def test_what_stands_in_it_is_what_the_bundle_does(bundle):
    record = json.loads((bundle / "check.json").read_text())
    assert (record["schema_version"], record["dtype"]) == (1, "float32")
    assert record["surroundings"]["threads"] > 0
    assert {"evla", "torch", "transformers", "numpy"} <= set(record["surroundings"]["versions"])
    policy = load_policy(bundle)
    generator = torch.Generator().manual_seed(record["seed"])
    found = policy.predict([Image.fromarray(fixed_image())], [record["instruction"]], generator=generator)
    assert np.array_equal(found.denoised_actions[0], np.array(record["denoised_action"], dtype=np.float32))
    gripper = found.denoised_actions[..., 6]
    assert np.array_equal(found.normalized_actions[..., 6], gripper >= 0.5)
    assert not np.isin(gripper, (0, 1)).any()


def test_manifest_does_not_know_it(bundle, cogact_run, tmp_path):
    """So that a manifest's bytes are the same wherever the bundle is made."""
    text = evla("export", cogact_run, tmp_path / "b", "--num-visual-tokens", 8, "--cache-interval", 5, "--no-act")
    assert text.endswith("verified, but for acting.\n")
    assert not (tmp_path / "b/check.json").exists()
    assert (tmp_path / "b/manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()
    assert "check.json" not in json.loads((bundle / "manifest.json").read_text())["files"]


def test_fixed_image_is_what_it_was():
    """Another one needs another name."""
    image = fixed_image()
    assert (image.shape, image.dtype) == ((224, 224, 3), np.uint8)
    assert image[5, 7].tolist() == [7, 5, 2]
    assert image[200, 201].tolist() == [201, 200, 200 * 201 // 16 % 256]


def test_model_of_several_datasets(cogact_run, tmp_path):
    run = shutil.copytree(cogact_run, tmp_path / "run")
    statistics = json.loads((run / "dataset_statistics.json").read_text())
    (run / "dataset_statistics.json").write_text(json.dumps(statistics | {"garage": statistics["kitchen"]}))
    pipeline.export(run, tmp_path / "b", pipeline.settings_with(None))
    assert verify_bundle(tmp_path / "b")["act"]["largest_difference"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, cogact_run, tmp_path):
    pipeline.export(cogact_run, tmp_path / "b", pipeline.settings_with(None), dtype=dtype)
    assert json.loads((tmp_path / "b/check.json").read_text())["dtype"] == dtype
    assert verify_bundle(tmp_path / "b")["act"]["largest_difference"] == 0
    change(tmp_path / "b", lambda record: (move(record, 0.09), record["surroundings"].update(threads=64)))
    assert verify_bundle(tmp_path / "b")["act"]["tolerance"] == 0.1
    change(tmp_path / "b", lambda record: move(record, 0.02))
    with pytest.raises(CheckFailed, match=r"differ by up to 0\.1"):
        verify_bundle(tmp_path / "b")


# What is compared


def test_the_same_to_the_bit(bundle):
    act = evla_json("verify", bundle)["act"]
    assert act == {"acted": True, "compared": True, "largest_difference": 0.0, "tolerance": 0.0, "elsewhere": []}
    line = "It acts as check.json says: largest difference 0, allowed 0."
    assert evla("verify", bundle).splitlines()[1:] == [line]


def test_anything_else_fails(copy):
    change(copy, lambda record: move(record, 2e-7))
    error = evla_error("verify", copy, code=1)
    assert "does not act as its check.json says (made under the same conditions): the actions differ by" in error
    assert error.endswith("0 is allowed.\n")


@pytest.mark.parametrize(("name", "value"), [("threads", 64), ("processor", "another"), ("torch", "2.12.0")])
def test_elsewhere_little_is_allowed(name, value, copy):
    def edit(record: Record) -> None:
        surroundings = record["surroundings"]
        (surroundings if name in surroundings else surroundings["versions"])[name] = value
        move(record, 9e-5)

    change(copy, edit)
    act = verify_bundle(copy)["act"]
    assert act["largest_difference"] == pytest.approx(9e-5, rel=1e-3)
    assert (act["tolerance"], act["elsewhere"]) == (1e-4, [name])
    assert f"allowed 0.0001 (other {name})." in evla("verify", copy)
    change(copy, lambda record: move(record, 9e-5))
    assert f"(made with other {name})" in evla_error("verify", copy, code=1)


def test_with_another_number_of_threads(bundle):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        act = verify_bundle(bundle)["act"]
    finally:
        torch.set_num_threads(before)
    assert act["elsewhere"] == ["threads"]
    assert act["largest_difference"] < 1e-5


def test_bundle_without_it_acts_and_is_not_compared(copy):
    (copy / "check.json").unlink()
    assert verify_bundle(copy)["act"] == {"acted": True, "compared": False, "reason": "it has no check.json"}
    assert "It acts; not compared, since it has no check.json.\n" in evla("verify", copy)


def test_no_act_leaves_it_out(copy, monkeypatch):
    monkeypatch.setattr(LlamaAttention, "forward", None)
    (copy / "check.json").write_text("{")
    assert evla_json("verify", copy, "--no-act")["act"]["acted"] is False
    assert "It did not act: --no-act was given.\n" in evla("verify", copy, "--no-act")
    assert "--no-act does nothing with --against" in evla_error("verify", copy, "--no-act", "--against", copy)


def test_pruned_checkpoint_is_no_bundle(cogact_run, tmp_path):
    evla("prune", cogact_run, tmp_path / "pruned", "--drop-layer-ids", "4")
    assert "It did not act: it is no bundle.\n" in evla("verify", tmp_path / "pruned")


DAMAGES: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "not a number": ("denoised_action must be finite", lambda r: move(r, float("nan"))),
    "infinity": ("denoised_action must be finite", lambda r: move(r, float("inf"))),
    "text for a number": ("must be a number", lambda r: r["denoised_action"][0].__setitem__(0, "1")),
    "row too short": ("must have rows of one length", lambda r: r["denoised_action"][0].pop()),
    "no rows": ("must have rows of one length", lambda r: r.update(denoised_action=[])),
    "unknown dtype": ("dtype must be one of", lambda r: r.update(dtype="int8")),
    "other image": ("image must be 'gradients-1'", lambda r: r.update(image="gradients-2")),
    "other instruction": ("instruction must be 'open the drawer'", lambda r: r.update(instruction="x" * 5000)),
    "other seed": ("seed must be 0", lambda r: r.update(seed=-1)),
    "unknown key": ("Did you mean 'threads'", lambda r: r["surroundings"].update(thread=1)),
    "missing key": ("missing key 'surroundings'", lambda r: r.pop("surroundings")),
    "other version": ("schema_version is 2", lambda r: r.update(schema_version=2)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged(name, copy):
    message, edit = DAMAGES[name]
    change(copy, edit)
    with pytest.raises(EvlaError, match=message) as error:
        ActionCheck.load(copy)
    assert "check.json" in str(error.value)


def test_of_another_model(copy):
    change(copy, lambda record: record["denoised_action"].pop())
    assert "check.json is of another model: size 15 x 7, here 16 x 7." in evla_error("verify", copy, code=1)
    change(copy, lambda record: record.update(dtype="bfloat16"))
    assert "check.json is of another model: dtype bfloat16, here float32." in evla_error("verify", copy, code=1)


@pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), (" " * 2_000_000, "more than 1,000,000")])
def test_no_json(content, message, copy):
    (copy / "check.json").write_text(content)
    error = evla_error("verify", copy, code=1)
    assert message in error
    assert error.count("\n") == 1


def test_not_a_file(copy):
    (copy / "check.json").unlink()
    (copy / "check.json").mkdir()
    assert "check.json is not a file" in evla_error("verify", copy, code=1)


# What cannot act

ERRORS = {
    "KeyError: 'x'": KeyError("x"),
    "TypeError: got an unexpected keyword": TypeError("got an unexpected keyword\nand more"),
    "RuntimeError: no message": RuntimeError(),
    "AttributeError: y": AttributeError("y"),
    "AssertionError: z": AssertionError("z"),
    "out of memory; --no-act": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2**40"),
    "cannot act: out of memory": MemoryError(),
}


def break_transformers(monkeypatch, error: BaseException) -> None:
    def forward(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(LlamaAttention, "forward", forward)


@pytest.mark.parametrize("message", ERRORS)
def test_library_that_the_runtime_does_not_fit(message, bundle, monkeypatch):
    break_transformers(monkeypatch, ERRORS[message])
    error = evla_error("verify", bundle, code=1)
    assert error.startswith(f"Error: {bundle} cannot act: ")
    assert message in error
    assert error.count("\n") == 1
    assert "transformers " in error or "memory" in error


def test_export_that_cannot_act_leaves_nothing(cogact_run, tmp_path, monkeypatch):
    break_transformers(monkeypatch, KeyError("x"))
    error = evla_error("export", cogact_run, tmp_path / "b", code=1)
    assert "cannot act: KeyError: 'x'" in error
    assert not any(tmp_path.iterdir())


def test_interrupt_is_no_failed_check(bundle, monkeypatch):
    break_transformers(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        verify_bundle(bundle)


def test_action_that_is_not_finite(bundle, monkeypatch):
    """Clipped, an infinity would be a 1."""
    attend = LlamaAttention.forward

    def forward(self: LlamaAttention, *arguments: Any, **options: Any) -> Any:
        output, *more = attend(self, *arguments, **options)
        return output * float("inf"), *more

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert "cannot act: " in evla_error("verify", bundle, code=1)


def test_changed_bytes_are_told_before_it_acts(copy, monkeypatch):
    break_transformers(monkeypatch, KeyError("x"))
    (copy / "README.md").write_text((copy / "README.md").read_text().replace("Made by", "made by"))
    assert "1 files differ from the manifest (first: README.md)" in evla_error("verify", copy, code=1)


# Who else sees it


def test_it_makes_no_bundle_another(bundle, copy):
    change(copy, lambda record: move(record, 1.0))
    assert compare_checkpoints(bundle, copy).differences == ()
    assert open_checkpoint(copy).small_files_sha256() == open_checkpoint(bundle).small_files_sha256()
    (copy / "check.json").unlink()
    assert compare_checkpoints(bundle, copy).differences == ()


def test_what_is_made_of_a_bundle_does_not_inherit_it(bundle, tmp_path):
    pipeline.prune(bundle, tmp_path / "pruned", drop_ids=(4,))
    assert not (tmp_path / "pruned/check.json").exists()
    pipeline.export(tmp_path / "pruned", tmp_path / "b", pipeline.settings_with(None))
    pipeline.export(bundle, tmp_path / "unchecked", pipeline.settings_with(None), act=False)
    assert (tmp_path / "b/check.json").read_bytes() != (bundle / "check.json").read_bytes()
    assert not (tmp_path / "unchecked/check.json").exists()


def test_file_of_that_name_beside_other_weights_is_the_users(decoders, tmp_path):
    source = shutil.copytree(decoders("llama"), tmp_path / "llama")
    (source / "check.json").write_text("{}")
    pipeline.prune(source, tmp_path / "pruned", drop_ids=(4,))
    assert (tmp_path / "pruned/check.json").read_text() == "{}"


def test_known_finite_values_are_not_looked_at_again():
    nan = torch.full((2,), float("nan"))
    assert load_finite("a", LazyTensor.of(nan, finite=True)).isnan().all()
    with pytest.raises(EvlaError, match="a holds NaN"):
        load_finite("a", LazyTensor.of(nan))
