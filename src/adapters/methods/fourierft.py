"""FourierFT: a change of a linear map given by a few of its Fourier coefficients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..configuration.checks import check_choice, check_integer, check_number, is_integer
from ..configuration.registry import register_architecture, register_config
from ..errors import AdapterError
from ..method import register, seeded
from ..sites import LinearSite
from .linear_method import LinearUpdate, LinearUpdateConfig


@dataclass(eq=False)
class FourierFTConfig(LinearUpdateConfig):
    """A few learned Fourier coefficients for each linear map. Gao et al. 2024, arXiv:2405.03003.

    ``n_frequency`` is the number of coefficients of a map; their places are drawn with ``random_loc_seed``. ``scaling``
    multiplies the change. ``init_weights``: ``"identity"`` starts as the unchanged model, ``"random"`` with normal
    coefficients. The other fields are those of ``LinearMethodConfig``; ``dropout`` is that of the change's input.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "fourierft"
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    init_weights: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "n_frequency", least=1)
        check_number(self, "scaling")
        if not is_integer(self.random_loc_seed):
            raise self.refusal("random_loc_seed", "no seed", "it must be an integer")
        check_choice(self, "init_weights", ("identity", "random"))


register_architecture("fourierft", FourierFTConfig)
register_config("fourierft", FourierFTConfig())


class Places(nn.Module):
    """Where the coefficients of all maps (out, in) of one size stand in the half spectrum (out, in // 2 + 1).

    The change is real, so the other half follows: a coefficient c at (u, v) acts as c / 2 there and at (-u, -v).
    Buffers: coefficient (m,), which coefficient stands at position (m,) of the flattened half spectrum.
    """

    def __init__(self, config: FourierFTConfig, outputs: int, inputs: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(config.random_loc_seed)
        drawn = torch.randperm(outputs * inputs, generator=source)[: config.n_frequency]
        row, column = drawn // inputs, drawn % inputs
        rows = torch.cat([row, -row % outputs])
        columns = torch.cat([column, -column % inputs])
        width = inputs // 2 + 1
        inside = columns < width
        coefficient = torch.arange(config.n_frequency).repeat(2)
        self.register_buffer("coefficient", coefficient[inside], persistent=False)
        self.register_buffer("position", (rows * width + columns)[inside], persistent=False)


@register(FourierFTConfig, LinearSite)
class FourierFT(LinearUpdate):
    """y = Wx + scaling Re(F⁻¹(S)) x

    S (out, in) is zero but for n learned entries, at places that are drawn once; F⁻¹ is the inverse discrete Fourier
    transform in two dimensions. Gao et al. 2024, arXiv:2405.03003, eq. 2 to 4. The change is real, so half of the
    spectrum is enough: one real transform, of half the cost.

    Site: LinearSite. Parameters: fourierft_spectrum (n_frequency,).
    Start: identity (zeros) unless ``init_weights="random"``. Merges: yes.
    """

    def __init__(self, config: FourierFTConfig, site: LinearSite, shared: nn.ModuleDict) -> None:
        super().__init__(config)
        self.scaling, self.shape, self.size = config.scaling, (site.outputs, site.inputs), size_of(site)
        self._places = (shared,)  # in a tuple, so that it is not registered at every map
        self.fourierft_spectrum = self.new(config.n_frequency)
        with seeded(config.init_weights_seed):
            if config.init_weights == "random":
                nn.init.normal_(self.fourierft_spectrum)
            else:
                nn.init.zeros_(self.fourierft_spectrum)

    @classmethod
    def share(cls, config: FourierFTConfig, sites: Sequence[LinearSite]) -> nn.ModuleDict:
        """The places, for each size of a map."""
        places = nn.ModuleDict()
        for site in sites:
            if config.n_frequency > site.outputs * site.inputs:
                raise AdapterError(
                    f"add_adapter(FourierFTConfig(n_frequency={config.n_frequency})): the map at {site.path} has only "
                    f"{site.outputs * site.inputs} entries; choose n_frequency up to that, or leave the map out."
                )
            if size_of(site) not in places:
                places[size_of(site)] = Places(config, site.outputs, site.inputs)
        return places

    def delta(self) -> Tensor:
        """See the base."""
        places = self._places[0].get_submodule(self.size)
        coefficient, position = places.get_buffer("coefficient"), places.get_buffer("position")
        outputs, inputs = self.shape
        width = inputs // 2 + 1
        spectrum = self.fourierft_spectrum
        exact = spectrum if spectrum.dtype == torch.float64 else spectrum.float()  # there is no transform of halves
        half = exact.new_zeros(outputs * width).index_add(0, position, exact[coefficient])
        half = half.view(outputs, width)
        change: Tensor = torch.fft.irfft2(torch.complex(half, torch.zeros_like(half)), s=self.shape)
        return (change * (self.scaling / 2)).to(spectrum.dtype)


def size_of(site: LinearSite) -> str:
    """The key of a map's size."""
    return f"{site.outputs}x{site.inputs}"
