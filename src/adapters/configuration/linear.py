"""What the configurations of all methods at linear maps have in common: which maps."""

from dataclasses import dataclass, field

from .base import AdapterConfig
from .checks import check_dtype, check_layers, check_letters

ATTENTION_MATRICES = ("q", "k", "v", "o")


@dataclass(eq=False)
class LinearMethodConfig(AdapterConfig):
    """The linear maps that a method changes, by the names that ``LoRAConfig`` has for them.

    ``selfattn_lora``: the projections of every attention that ``attn_matrices`` names (q, k, v and o, the output);
    ``intermediate_lora`` and ``output_lora``: the first and the second map of the feed-forward block; in all layers
    but those in ``leave_out``. ``dtype`` is the name of the torch dtype of the new parameters; None is the model's.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: list[int] = field(default_factory=list)
    attn_matrices: list[str] = field(default_factory=lambda: ["q", "v"])
    init_weights_seed: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "leave_out")
        check_letters(self, "attn_matrices", ATTENTION_MATRICES)
        check_dtype(self, "dtype")

    def includes(self, location: str, role: str, layer: int) -> bool:
        """Whether the map of this role, at the location of that name and in that layer, is changed."""
        named = location != "selfattn_lora" or role in self.attn_matrices
        return bool(self[location]) and named and layer not in self.leave_out

    def locations(self) -> set[str]:
        """The location flags that are set."""
        return {name for name in ("selfattn_lora", "intermediate_lora", "output_lora") if self[name]}
