"""The smallest inputs that a model runs on, by the names of what its forward takes and what its config says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH = 2, 5
CHANNELS = "num_channels in_channels in_chans input_channels"


class Sample:
    """Makes the inputs of one model on one device."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """See the class."""
        self.model, self.device = model, device
        self.configs = list(_inside(model.config, ""))
        self.accepted = inspect.signature(model.forward).parameters

    def number(self, names: str, tower: str = "", default: int = 0) -> int:
        """The first of these fields that is set; that of a part whose name has `tower` in it goes before all others."""
        ordered = [*(config for name, config in self.configs if tower and tower in name)]
        ordered += [config for _, config in self.configs]
        for name in names.split():
            for config in ordered:
                value = getattr(config, name, None)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int) and value:
                    return value
        return default

    def size(self) -> tuple[int, int]:
        """(h, w) of images."""
        for _, config in sorted(self.configs, key=lambda entry: "vision" not in entry[0]):
            value = getattr(config, "image_size", None)
            if isinstance(value, int) and value:
                return value, value
            if isinstance(value, (list, tuple)) and len(value) > 1:
                return value[0], value[1]
            if isinstance(value, dict) and {"height", "width"} <= value.keys():
                return value["height"], value["width"]
        side = self.number("input_size crop_size", "vision", 64)
        return side, side

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(b, *shape)."""
        return torch.zeros(ROWS, *shape, dtype=dtype, device=self.device)

    def tokens(self) -> Tensor:
        """(b, s) of tokens that are neither padding nor the place of something else."""
        special = {
            value
            for _, config in self.configs
            for name, value in vars(config).items()
            if isinstance(value, int) and ("token" in name or name.endswith(("_id", "_index")))
        }
        known = min(self.number("vocab_size", "text", 1000), 1000)
        plain = [token for token in range(3, known) if token not in special] or [known - 1]
        chosen = [plain[place % len(plain)] for place in range(ROWS * LENGTH)]
        return torch.tensor(chosen, device=self.device).view(ROWS, LENGTH)

    def image(self) -> Tensor:
        """(b, c, h, w)."""
        return self.zeros(self.number(CHANNELS, "vision", 3), *self.size())

    def video(self) -> Tensor:
        """(b, t, c, h, w)."""
        frames = self.number("num_frames frames_per_clip", "vision", 4)
        return self.image()[:, None].expand(-1, frames, -1, -1, -1)

    def pixels(self) -> Tensor:
        """An image, or a video where the config counts frames."""
        return self.video() if self.number("num_frames") else self.image()

    def waveform(self) -> Tensor:
        """(b, n), for codecs (b, 1, n)."""
        sound = self.zeros(1600)
        return sound[:, None] if self.number("audio_channels sampling_rate hop_length") else sound

    def spectrogram(self) -> Tensor:
        """(b, bins, t) as Whisper takes it, else (b, t, bins)."""
        bins = self.number("num_mel_bins input_feat_per_channel feature_projection_input_dim input_dim", "audio", 16)
        projected = self.number("feature_projection_input_dim", "audio")
        frames = 0 if projected else 2 * self.number("max_source_positions", "audio")
        return self.zeros(bins, frames) if frames else self.zeros(64, bins)

    def series(self) -> Tensor:
        """(b, t) or, of several channels, (b, t, c)."""
        length = self.number("context_length", default=16)
        lags = max(getattr(self.model.config, "lags_sequence", None) or [0])
        channels = self.number("num_input_channels")
        return self.zeros(length + lags, *([channels] if channels else []))

    def hidden(self) -> Tensor:
        """(b, s, d)."""
        return self.zeros(LENGTH, self.number("hidden_size d_model"))

    def patches(self) -> Tensor:
        """(b × 16, n): the pixels of all patches of ``grid``, side by side."""
        side, depth = self.number("patch_size", "vision", 8), self.number("temporal_patch_size", "vision", 1)
        return torch.zeros(ROWS * 16, self.number(CHANNELS, "vision", 3) * depth * side**2, device=self.device)

    def states(self) -> Tensor:
        """Patches, or an image for an encoder that is given one as its hidden states."""
        return self.image() if self.model.main_input_name == "pixel_values" and not self._packs else self.patches()

    @property
    def _packs(self) -> bool:
        return any("grid" in name or "seqlens" in name for name in self.accepted)

    def grid(self) -> Tensor:
        """(b, 3): each image has one frame of 4 × 4 patches. Its values are read, so it is never without data."""
        return torch.tensor([[1, 4, 4]] * ROWS)

    def whole(self, length: int = LENGTH) -> Tensor:
        """(b, s) of ones."""
        return self.zeros(length, dtype=torch.long) + 1

    def inputs(self) -> dict[str, Any]:
        """The main input, those that have no default, the decoder's, and those of a second tower."""
        names = [name for name, parameter in self.accepted.items() if _is_required(parameter)]
        makers = dict.fromkeys(names[:1], Sample.tokens) | MAKERS  # of a foreign name: tokens are the best guess
        main: Any = getattr(self.model, "main_input_name", "input_ids")
        names += [main] if isinstance(main, str) else []
        names += ["decoder_input_ids"] if getattr(self.model.config, "is_encoder_decoder", False) else []
        names += ["bbox", "visual_feats", "visual_pos"]
        sees = any("vision" in name for name, _ in self.configs)
        if sees and not any(_is_image_token(name) for _, config in self.configs for name in vars(config)):
            names += ["input_ids", "pixel_values"]
        return {name: makers[name](self) for name in dict.fromkeys(names) if name in self.accepted and name in makers}


MAKERS: dict[str, Callable[[Sample], Any]] = {
    "input_ids": Sample.tokens,
    "decoder_input_ids": Sample.tokens,
    "qformer_input_ids": Sample.tokens,
    "attention_mask": Sample.whole,
    "pixel_values": Sample.pixels,
    "pixel_values_videos": Sample.video,
    "input_values": Sample.waveform,
    "input_features": Sample.spectrogram,
    "input_features_mask": lambda sample: sample.whole(64),
    "inputs_embeds": Sample.hidden,
    "query_embeds": Sample.hidden,
    "context": Sample.hidden,
    "hidden_states": Sample.states,
    "grid_thw": Sample.grid,
    "image_grid_thw": Sample.grid,
    "merge_sizes": lambda sample: sample.whole(1)[:, 0],
    "past_values": Sample.series,
    "past_observed_mask": lambda sample: sample.series() + 1,
    "past_time_features": lambda sample: sample.zeros(
        sample.series().shape[1], sample.number("num_time_features", default=1)
    ),
    "visual_feats": lambda sample: sample.zeros(3, sample.number("visual_feat_dim", default=8)),
    "visual_pos": lambda sample: sample.zeros(3, sample.number("visual_pos_dim", default=4)),
    "bbox": lambda sample: sample.zeros(LENGTH, 4, dtype=torch.long) + 1,
}
"""What makes an input, by its name."""


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _is_image_token(name: str) -> bool:
    return "image" in name and ("token" in name or name.endswith("_index"))


def _inside(config: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A config and those inside of it, by the way there."""
    yield name, config
    for key, value in vars(config).items():
        if hasattr(value, "model_type"):
            yield from _inside(value, f"{name}.{key}")
