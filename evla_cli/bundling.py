"""Self-contained bundles: everything a robot process needs in one directory, written and verified."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.bundle import (
    CHECK,
    SETTINGS,
    check_is_bundle,
    differing_files,
    library_versions,
    open_bundle,
    open_manifest,
    write_manifest,
)
from evla_cli.checkpoint.files import copy_file, write_json, write_text, write_yaml
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors, load_finite, total_bytes, total_elements
from evla_cli.errors import CheckFailed, EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.families.base import TOKENIZER_FILES, Checkpoint
from evla_cli.models.processing import CogACTProcessor
from evla_cli.models.skeleton import check_fits, is_out_of_memory
from evla_cli.plan import PLAN, PrunePlan
from evla_cli.progress import progress_bar
from evla_cli.runtime.action_check import ActionCheck, act_once, compare_actions
from evla_cli.runtime.policy import policy_from_weights
from evla_cli.settings import InferenceSettings, PruneRecipe


def write_bundle_files(
    checkpoint: Checkpoint,
    dest: Path,
    settings: InferenceSettings,
    dtype: str | None,
    shard_bytes: int,
    hashes: dict[str, str],
) -> None:
    """Everything in a bundle but the weights, whose `hashes` are known; the manifest last, since it lists the rest."""
    assert checkpoint.tokenizer_dir is not None
    write_json(dest / "config.json", checkpoint.config, allow_nan=True)
    write_yaml(dest / SETTINGS, settings.to_record(), "How evla's runtime runs this model; every key: docs/files.md.")
    for name in TOKENIZER_FILES:
        if (checkpoint.tokenizer_dir / name).is_file():
            copy_file(checkpoint.tokenizer_dir / name, dest / name)
    copy_file(checkpoint.root / "dataset_statistics.json", dest / "dataset_statistics.json")
    plan = None
    if (checkpoint.root / PLAN).is_file():
        copy_file(checkpoint.root / PLAN, dest / PLAN)
        plan = PrunePlan.load(dest / PLAN)
    write_text(dest / "README.md", _readme(checkpoint, settings))
    export = {"dtype": dtype, "max_shard_size": str(shard_bytes)}
    write_manifest(dest, _provenance(checkpoint, plan, export), hashes)


def _provenance(checkpoint: Checkpoint, plan: PrunePlan | None, export: dict[str, Any]) -> dict[str, Any]:
    """Where a bundle comes from: hashes instead of paths, and the options of every stage under a recipe's keys."""
    source = {
        "family": checkpoint.family.name,
        "layout": checkpoint.layout,
        "checkpoint_sha256": checkpoint.reader.sha256,
    }
    if plan is None:
        return {"source": source, "plan": None, "recipe": {"export": export}}
    decided = {
        "checkpoint_sha256": plan.checkpoint_sha256,
        "samples_sha256": plan.how.get("samples_sha256"),
        "keep_layers": list(plan.keep_layers),
        "kept_intermediate_size": plan.kept_intermediate_size,
    }
    if plan.vision:
        decided["vision"] = {
            name: {"keep_layers": list(tower.keep_layers), "kept_intermediate_size": tower.kept_intermediate_size}
            for name, tower in plan.vision.items()
        }
    recipe: dict[str, Any] = {"analyze": plan.how["analyze"]} if plan.how.get("analyze") else {}
    options = {field.name: plan.how.get(field.name) for field in fields(PruneRecipe)}
    recipe["prune"] = {name: value for name, value in options.items() if value is not None}  # no method: none was used
    return {"source": source, "plan": decided, "recipe": recipe | {"export": export}}


def verify_bundle(root: Path, act: bool = True) -> dict[str, Any]:
    """All that can be wrong with a bundle or a pruned checkpoint: files and hashes, weights against the model, NaN, and
    a bundle's settings against both; then a bundle acts once, as its `check.json` says if it has one.

    Errors: CheckFailed for whatever is wrong; EvlaError where there is nothing to check.
    """
    facts, action = _verified(root, act)
    if action is None:
        reason = "--no-act was given" if not act else "it is no bundle"
        return facts | {"act": {"acted": False, "compared": False, "reason": reason}}
    try:
        then = ActionCheck.load(root)
        if then is None:
            return facts | {"act": {"acted": True, "compared": False, "reason": f"it has no {CHECK}"}}
        result = compare_actions(then, action)
    except EvlaError as error:
        raise CheckFailed(str(error)) from error
    if not result.passed:
        where = (
            f"made with other {', '.join(result.elsewhere)}" if result.elsewhere else "made under the same conditions"
        )
        raise CheckFailed(
            f"{root} does not act as its {CHECK} says ({where}): the actions differ by up to "
            f"{result.largest_difference:g}, {result.tolerance:g} is allowed."
        )
    compared = {"largest_difference": result.largest_difference, "tolerance": result.tolerance}
    return facts | {"act": {"acted": True, "compared": True, **compared, "elsewhere": list(result.elsewhere)}}


def finish_bundle(root: Path, act: bool = True) -> dict[str, Any]:
    """Read again what was just written, let it act, and write down what it did, for `verify_bundle` to compare with."""
    facts, action = _verified(root, act)
    if action is not None:
        action.write(root)
    return facts | {"acted": action is not None}


def _verified(root: Path, act: bool) -> tuple[dict[str, Any], ActionCheck | None]:
    """Amounts found to be right, and what the bundle did; None for what cannot or need not act. Reads every byte
    once, and a second time what acts and did not stay in the page cache."""
    check_is_bundle(root)
    ahead, action = None, None
    try:
        bundle = open_manifest(root)
        problem: EvlaError | None = None
        digests = None
        try:
            checkpoint = open_checkpoint(root)
            act = act and checkpoint.layout == "bundle"
            ahead = checkpoint.reader.start_hashing(drop_behind=not act)
            checked = _check_contents(checkpoint, keep=act)
            digests = ahead.digests()
        except OSError as error:  # the hashes, which read the files again, may tell what it is
            problem = EvlaError(f"Cannot read {root}: {error.strerror}.")
        except EvlaError as error:  # of a file that was changed, that is the thing to say
            problem = error
        changed = differing_files(bundle, digests)
        if changed:
            raise EvlaError(
                f"{root}: {len(changed)} files differ from the manifest (first: {changed[0]})."
            ) from problem
        if problem is not None:
            raise problem
        if act:  # now that every byte is what was written: only what reads them can be wrong
            action = _act(replace(checkpoint, weights=checked))
    except EvlaError as error:
        raise CheckFailed(str(error)) from error
    finally:
        if act and ahead is not None:
            ahead.drop()
    weights = checkpoint.weights
    return {"files": len(bundle.files), "tensors": len(weights), "bytes": total_bytes(weights)}, action


def _check_contents(checkpoint: Checkpoint, keep: bool) -> LazyTensors:
    """Everything but the hashes. Returns the weights that were checked if they are to be kept."""
    root = checkpoint.root
    if checkpoint.layout == "bundle":
        open_bundle(root)
        check_export(checkpoint, InferenceSettings.load(root / SETTINGS))
    else:
        check_fits(checkpoint.family, checkpoint.config, checkpoint.weights, root)
    checked = {}
    with progress_bar("verifying", total_bytes(checkpoint.weights), "B") as bar:
        for name, lazy in checkpoint.weights.items():
            tensor = load_finite(name, lazy)
            if keep:
                checked[name] = LazyTensor.of(tensor, finite=True)
            bar.update(lazy.num_bytes)
    return checked


def _act(checkpoint: Checkpoint) -> ActionCheck:
    """Let the bundle act as in a robot process. Errors (CheckFailed): whatever happens but an interrupt."""
    try:
        return act_once(policy_from_weights(checkpoint, InferenceSettings.load(checkpoint.root / SETTINGS)))
    except Exception as error:  # of transformers and torch, which raise any kind when they do not fit
        raise CheckFailed(f"{checkpoint.root} cannot act: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, EvlaError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory; --no-act leaves the act out."
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    first_line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first_line:.300} (with {versions}; its manifest says what it was made with)."


def check_export(checkpoint: Checkpoint, settings: InferenceSettings, num_layers: int | None = None) -> None:
    """Everything that a policy needs but the weights' values: names, shapes, tokenizer, settings it can obey.

    Args:
        num_layers: that will be left when the checkpoint has been pruned; None: as many as it has.
    """
    if not checkpoint.family.has_action_head:
        raise EvlaError(
            f"{checkpoint.root} has no action head, so there is nothing to run as a policy; a pruned decoder loads "
            "with transformers as it is."
        )
    if checkpoint.tokenizer_dir is None:
        raise EvlaError(f"{checkpoint.root} has no tokenizer.json; copy the tokenizer's files there.")
    check_fits(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root)
    config = checkpoint.family.build_config(checkpoint.config)
    CogACTProcessor(config, checkpoint.tokenizer_dir)
    settings.check(
        config.num_visual_tokens,
        checkpoint.num_layers if num_layers is None else num_layers,
        config.action_config.num_hidden_layers,
        config.action_config.num_train_steps,
    )


def _readme(checkpoint: Checkpoint, settings: InferenceSettings) -> str:
    tokens, cache, diffusion = settings.visual_tokens, settings.action_cache, settings.diffusion
    return f"""\
# A compressed {checkpoint.family.name} policy

Made by `evla export`. {total_elements(checkpoint.weights) / 1e6:,.1f} M parameters; {checkpoint.num_layers} decoder
layers with an MLP width of {checkpoint.intermediate_size}; {tokens.num_keep or "all"} visual tokens kept (method
{tokens.method}); {diffusion.num_denoise_steps} denoising steps, the action head computed every {cache.interval}.

    import evla_cli
    policy = evla_cli.load_policy("path/to/this/directory")
    policy.reset()  # where an episode starts
    actions = policy.predict_action(image, "pick up the red block")  # (horizon, action_dim), in the robot's units

| file | what it is |
|---|---|
| `config.json`, `*.safetensors` | the model; its config also holds the statistics that un-normalise the actions |
| `inference.yaml` | what the runtime does at inference; change it with `evla export`, so that the manifest stays true |
| `tokenizer.json`, `dataset_statistics.json` | as they came with the source |
| `prune_plan.yaml` | which layers and channels were removed, and why (where the source was pruned) |
| `manifest.json` | size and SHA-256 of every file; `evla verify` checks them |
| `check.json` | what it did where it was made (if it acted there); `evla verify` lets it act again and compares |
"""
