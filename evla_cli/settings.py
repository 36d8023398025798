"""Settings that a runtime obeys (`inference.yaml`) and recipes that `evla run` follows: strict, frozen, torch-free."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.files import read_yaml
from evla_cli.errors import EvlaError, suggest
from evla_cli.schema import SCHEMA_VERSION, check_schema_version, from_mapping, to_mapping

# What `method` may be, and which of the section's other keys each method obeys; the others must be left alone.
TOKEN_METHODS = {
    "evla": ("num_keep", "prune_layer", "num_key", "task_ratio", "context", "diversity"),
    "fastv": ("num_keep", "prune_layer"),
    "random": ("num_keep", "prune_layer", "seed"),
    "vla_cache": ("similarity_threshold", "num_static", "num_task", "entropy_scale", "context"),
    "none": (),
}
CACHE_METHODS = {"static": ("interval", "modules", "blocks"), "none": ()}
CONTEXTS = ("text", "instruction", "cognition")
DIVERSITIES = ("one_shot", "all_selected", "greedy")
MODULES = ("attention", "mlp")
SAMPLERS = ("ddim", "ddpm")
MLP_METHODS = ("activation", "prunenet", "magnitude", "random")
DRAWING_METHODS = ("prunenet", "random")  # that a seed decides something in
VISION_MLP_METHODS = ("activation", "magnitude", "random")
LAYER_METHODS = ("cosine", "iterative", "refit-aware")
OBJECTIVES = ("hidden", "action")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class VisualTokenSettings:
    """How the decoder saves work on visual tokens: keeping few of them, or taking some over from the frame before.

    Attributes:
        method: "evla" (EfficientVLA, arXiv 2506.10100, section 3.3), "fastv" (arXiv 2403.06764), "random" (a control),
            "vla_cache" (arXiv 2502.02175), "none". `TOKEN_METHODS` says which of the keys below each obeys.
        num_keep: visual tokens left; None keeps all.
        prune_layer: the tokens leave before this layer of the pruned decoder (0-based); the one before scores them.
        num_key: of them, how many are the highest-scoring "key" tokens.
        task_ratio: the share of the others taken by score; the rest is taken for diversity.
        context: the rows whose attention scores a visual token: every prompt token after the image, those of the
            instruction alone, or the cognition token alone.
        diversity: distance to the key tokens (Eq. 4), to key and task tokens, or greedily to everything chosen so far.
        seed: of the random choice.
        similarity_threshold: cosine of a patch's pixels in two frames from which on it counts as static.
        num_static: at most so many static tokens, the most similar ones; None: all that reach the threshold.
        num_task: tokens, the most attended ones of the frame before, that are computed anew though they be static;
            None: half of all.
        entropy_scale: how fast the share of static tokens that are reused grows over the layers (the paper's k).
    """

    method: str = field(default="evla", kw_only=True)
    num_keep: int | None = None
    prune_layer: int = 2
    num_key: int = 4
    task_ratio: float = 0.5
    context: str = "text"
    diversity: str = "one_shot"
    seed: int = 0
    similarity_threshold: float = 0.996
    num_static: int | None = None
    num_task: int | None = None
    entropy_scale: float = 1.0

    def __post_init__(self) -> None:
        _refuse_idle(self, TOKEN_METHODS)
        _at_least("prune_layer", self.prune_layer, 1)
        _at_least("num_key", self.num_key, 1)
        if not 0 <= self.task_ratio <= 1:
            raise EvlaError(f"task_ratio must be between 0 and 1, got {self.task_ratio}.")
        if self.num_keep is not None:
            _at_least("num_keep", self.num_keep, 1)
        if self.method == "evla" and self.num_keep is not None and self.num_keep < self.num_key:
            raise EvlaError(f"num_keep is {self.num_keep}, fewer than the {self.num_key} key tokens it must include.")
        _one_of("context", self.context, CONTEXTS)
        _one_of("diversity", self.diversity, DIVERSITIES)
        _at_least("seed", self.seed, 0)
        _at_least("num_static", self.num_static or 0, 0)
        _at_least("num_task", self.num_task or 0, 0)
        if not 0 <= self.similarity_threshold <= 1:
            raise EvlaError(f"similarity_threshold must be between 0 and 1, got {self.similarity_threshold}.")
        if not 0 <= self.entropy_scale < float("inf"):
            raise EvlaError(f"entropy_scale must be 0 or more, got {self.entropy_scale}.")

    @property
    def score_rows(self) -> str:
        """One of CONTEXTS. FastV's score is the attention of the last row, the cognition token's, alone."""
        return "cognition" if self.method == "fastv" else self.context

    @property
    def remembers_frames(self) -> bool:
        """Whether a prediction depends on the frame before."""
        return self.method == "vla_cache"

    @property
    def depends_on_calls(self) -> bool:
        """Whether a prediction depends on the calls before, of which a batch is one."""
        return self.remembers_frames or self.method == "random"


@dataclass(frozen=True)
class ActionCacheSettings:
    """How often the action head's blocks are computed (FORA, arXiv 2407.01425; EfficientVLA, section 3.4).

    Attributes:
        method: "static" (every `interval` steps) or "none".
        interval: denoising steps between two full computations; 1 is no caching.
        modules: what is reused in between: "attention", "mlp" or both.
        blocks: which blocks reuse; None is all of them.
    """

    method: str = field(default="static", kw_only=True)
    interval: int = 1
    modules: tuple[str, ...] = MODULES
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _refuse_idle(self, CACHE_METHODS)
        _at_least("interval", self.interval, 1)
        for module in self.modules:
            _one_of("modules", module, MODULES)
        if not self.modules or len(set(self.modules)) != len(self.modules):
            raise EvlaError(f"modules must name each of {', '.join(MODULES)} at most once, and one.")
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) != len(self.blocks)):
            raise EvlaError("blocks must list each block once, and at least one; leave it out for all.")

    @property
    def whole_stack(self) -> bool:
        return self.blocks is None and set(self.modules) == set(MODULES)


@dataclass(frozen=True)
class DiffusionSettings:
    """How an action chunk is sampled. `num_denoise_steps` is for DDIM; DDPM always takes every training step."""

    sampler: str = "ddim"
    num_denoise_steps: int = 10
    cfg_scale: float = 1.5  # classifier-free guidance; 1.0 is none

    def __post_init__(self) -> None:
        _one_of("sampler", self.sampler, SAMPLERS)
        _at_least("num_denoise_steps", self.num_denoise_steps, 1)
        if not 1.0 <= self.cfg_scale < float("inf"):
            raise EvlaError(f"cfg_scale must be at least 1 (1 is no guidance), got {self.cfg_scale}.")


@dataclass(frozen=True)
class InferenceSettings:
    """`inference.yaml`. The defaults change nothing: all tokens, no caching."""

    schema_version: int = SCHEMA_VERSION
    visual_tokens: VisualTokenSettings = field(default_factory=VisualTokenSettings)
    action_cache: ActionCacheSettings = field(default_factory=ActionCacheSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)

    @classmethod
    def load(cls, path: Path) -> "InferenceSettings":
        return from_mapping(cls, _read_versioned(path), str(path))

    def to_record(self) -> dict[str, Any]:
        """What stands in the file: the keys that the chosen methods obey."""
        record = to_mapping(self)
        for section, methods in (("visual_tokens", TOKEN_METHODS), ("action_cache", CACHE_METHODS)):
            obeyed = ("method", *methods[record[section]["method"]])
            record[section] = {key: record[section][key] for key in obeyed}
        return record

    def check(self, num_visual_tokens: int, num_layers: int, num_blocks: int, num_train_steps: int) -> None:
        """Refuse settings that the model cannot obey."""
        tokens, cache, steps = self.visual_tokens, self.action_cache, self.diffusion.num_denoise_steps
        for name in ("num_keep", "num_static", "num_task"):
            count = getattr(tokens, name)
            if count is not None and count > num_visual_tokens:
                raise EvlaError(f"visual_tokens.{name} is {count}; the model has {num_visual_tokens} visual tokens.")
        if tokens.num_keep is not None and tokens.prune_layer >= num_layers:
            raise EvlaError(
                f"visual_tokens.prune_layer is {tokens.prune_layer}; the decoder has {num_layers} layers, "
                f"so it must be at most {num_layers - 1}."
            )
        if self.diffusion.sampler == "ddpm":
            steps = num_train_steps
        possible = sorted({len(range(0, num_train_steps, stride)) for stride in range(1, num_train_steps + 1)})
        if steps not in possible:
            raise EvlaError(
                f"diffusion.num_denoise_steps {steps} is not a whole stride of {num_train_steps} training steps; "
                f"possible: {', '.join(map(str, possible))}."
            )
        if cache.interval > steps:
            raise EvlaError(
                f"action_cache.interval is {cache.interval}, more than the {steps} denoising steps; "
                f"make it at most {steps}."
            )
        beyond = [block for block in cache.blocks or () if not 0 <= block < num_blocks]
        if beyond:
            raise EvlaError(
                f"action_cache.blocks names block {beyond[0]}; the action head has blocks 0 to {num_blocks - 1}."
            )


@dataclass(frozen=True)
class AnalyzeRecipe:
    samples: str
    num_samples: int | None = None
    batch_size: int = 8
    dtype: str = "float32"
    position_weights: dict[str, float] = field(default_factory=dict)  # kind of position -> how often it counts

    def __post_init__(self) -> None:
        _not_empty("samples", self.samples)
        _at_least("batch_size", self.batch_size, 1)
        _one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class PruneScope:
    """What pruning is to do, as far as some of its keys only matter with it.

    Attributes:
        drops_layers, ranks_layers: whether decoder layers go, and some of them by rank.
        mlp_method, vision_mlp_method: how rows are chosen; None where none goes.
        runs_samples: whether the model is run on samples.
    """

    drops_layers: bool
    ranks_layers: bool
    mlp_method: str | None
    vision_mlp_method: str | None
    refit: bool
    runs_samples: bool

    def why_idle(self, key: str) -> str | None:
        """Why a key does nothing, other keys as {names}; None where it matters."""
        draws = self.mlp_method in DRAWING_METHODS or self.vision_mlp_method in DRAWING_METHODS
        by_rank = (self.ranks_layers, "where no layer goes by rank ({drop_layers})")
        samples = (self.runs_samples, "where the model is not run on {samples}")
        known = {
            "protect_first": (self.drops_layers, "where no layer goes ({drop_layers})"),
            "layer_method": by_rank,
            "objective": by_rank,
            "mlp_method": (self.mlp_method is not None, "without {mlp_prune_ratio}"),
            "vision_mlp_method": (self.vision_mlp_method is not None, "without {vision_mlp_prune_ratio}"),
            "seed": (draws, f"where no rows are drawn ({{mlp_method}} {' or '.join(DRAWING_METHODS)})"),
            "refit_last_weight": (self.refit, "without {refit}"),
            **dict.fromkeys(("num_samples", "batch_size", "memory_budget", "device"), samples),
        }
        matters, reason = known.get(key, (True, ""))
        return None if matters else reason


@dataclass(frozen=True)
class PruneRecipe:
    drop_layers: int | None = None  # None: those in `drop_layer_ids`
    drop_layer_ids: tuple[int, ...] = ()
    layer_method: str = "cosine"  # all but the default on the samples of `analyze`, and so `objective`
    objective: str = "hidden"
    protect_first: int | None = None
    mlp_prune_ratio: float = 0.0
    mlp_method: str = "activation"
    seed: int = 0
    vision_drop_layers: int = 0  # from each vision tower
    vision_mlp_prune_ratio: float = 0.0
    vision_mlp_method: str = "activation"
    refit: bool = False  # on the samples of `analyze`
    refit_last_weight: float | None = None  # how often a sample's last position counts; None: see RefitOptions

    def __post_init__(self) -> None:
        if self.drop_layers is not None:
            _at_least("drop_layers", self.drop_layers, 0)
        _at_least("seed", self.seed, 0)
        _one_of("layer_method", self.layer_method, LAYER_METHODS)
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("mlp_method", self.mlp_method, MLP_METHODS)
        if not 0 <= self.mlp_prune_ratio < 1:
            raise EvlaError(f"mlp_prune_ratio is the fraction removed, in [0, 1), got {self.mlp_prune_ratio}.")
        _at_least("vision_drop_layers", self.vision_drop_layers, 0)
        _one_of("vision_mlp_method", self.vision_mlp_method, VISION_MLP_METHODS)
        if not 0 <= self.vision_mlp_prune_ratio < 1:
            raise EvlaError(
                f"vision_mlp_prune_ratio is the fraction removed, in [0, 1), got {self.vision_mlp_prune_ratio}."
            )
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Errors: a key that is not at its default does nothing beside the others."""
        drops = self.drop_layers is not None and self.drop_layers > 0
        scope = PruneScope(
            drops_layers=drops or bool(self.drop_layer_ids),
            ranks_layers=drops and (self.drop_layers or 0) > len(set(self.drop_layer_ids)),
            mlp_method=self.mlp_method if self.mlp_prune_ratio else None,
            vision_mlp_method=self.vision_mlp_method if self.vision_mlp_prune_ratio else None,
            refit=self.refit,
            runs_samples=True,  # on those of `analyze`
        )
        names = {key.name: key.name for key in fields(self)}
        for key in fields(self):
            reason = scope.why_idle(key.name)
            if reason is not None and getattr(self, key.name) != key.default:
                raise EvlaError(f"{key.name} does nothing {reason.format_map(names)}; leave it out.")

    @property
    def needs_activations(self) -> bool:
        return self.mlp_prune_ratio > 0 and self.mlp_method in ("activation", "prunenet")

    @property
    def vision_needs_activations(self) -> bool:
        return self.vision_mlp_prune_ratio > 0 and self.vision_mlp_method == "activation"


@dataclass(frozen=True)
class ExportRecipe:
    settings: InferenceSettings = field(default_factory=InferenceSettings)
    dtype: str | None = None
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if self.dtype is not None:
            _one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class Recipe:
    """What `evla run` does. Stages that are left out are not run; paths are relative to the recipe.

    Attributes:
        source: the checkpoint to start from.
        output: the directory for what the stages write: `importance.json`, `pruned/`, `bundle/`.
    """

    source: str
    output: str
    analyze: AnalyzeRecipe | None = None
    prune: PruneRecipe | None = None
    export: ExportRecipe | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)
        _not_empty("source", self.source)
        _not_empty("output", self.output)
        if self.analyze is self.prune is self.export is None:
            raise EvlaError("The recipe names no stage; give at least one of analyze, prune, export.")
        if self.analyze is None and self.prune is not None:
            needing = {
                "mlp_method": self.prune.needs_activations,
                "vision_drop_layers": self.prune.vision_drop_layers > 0,
                "vision_mlp_method": self.prune.vision_needs_activations,
                "refit": self.prune.refit,
                "layer_method": self.prune.layer_method != "cosine",
                "objective": self.prune.objective != "hidden",
            }
            for key in [key for key, needs in needing.items() if needs]:
                raise EvlaError(f"prune.{key} needs calibration samples: give the recipe an analyze section.")

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        record = _read_versioned(path)
        for stage in ("analyze", "prune", "export"):
            if stage in record and record[stage] is None:
                raise EvlaError(f"{path}: {stage} is empty; leave it out, or write {{}} for the stage's defaults.")
        return from_mapping(cls, record, str(path))


def _read_versioned(path: Path) -> dict[str, Any]:
    record = read_yaml(path)
    if "schema_version" not in record:
        raise EvlaError(f"{path}: missing key 'schema_version' ({SCHEMA_VERSION}).")
    return record


def _refuse_idle(record: Any, methods: dict[str, tuple[str, ...]]) -> None:
    """An unknown method, or a key that is set though the method does not obey it."""
    _one_of("method", record.method, tuple(methods))
    for key in fields(record):
        obeyed = key.name in ("method", *methods[record.method])
        if not obeyed and getattr(record, key.name) != key.default:
            others = " or ".join(f"'{method}'" for method, keys in methods.items() if key.name in keys)
            raise EvlaError(
                f"{key.name} does nothing under method '{record.method}'; leave it out, or choose {others}."
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise EvlaError(f"{name} must be at least {least}, got {value}.")


def _not_empty(name: str, value: str) -> None:
    if not value.strip():
        raise EvlaError(f"{name} is empty; give a path.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise EvlaError(f"{name}: unknown value '{value}'. {suggest(value, known)}")
