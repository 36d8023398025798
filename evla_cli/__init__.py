"""Make Vision-Language-Action models small and fast enough for robots, without training."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from evla_cli.runtime.policy import Policy, load_policy

__all__ = ["Policy", "__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only when the runtime is asked for.
    if name in ("Policy", "load_policy"):
        from evla_cli.runtime import policy

        return getattr(policy, name)
    raise AttributeError(f"module 'evla_cli' has no attribute '{name}'")
