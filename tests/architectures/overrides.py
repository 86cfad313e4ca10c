"""What the rules for tiny models cannot know of a model type, as data: of its config, its class and its inputs."""

from collections.abc import Callable
from typing import Any

import torch

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1}
VALUES = {"past_values": lambda facts: torch.randn(2, 18), "past_observed_mask": lambda facts: torch.ones(2, 18)}
VALUES |= {"past_time_features": lambda facts: torch.randn(2, 18, 1)}
VALUES |= {"future_values": lambda facts: torch.randn(2, 4), "future_time_features": lambda facts: torch.randn(2, 4, 1)}

# "from": what the default config is made from; "with": fields put in after it was shrunk (... takes one out).
CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": {"with": SERIES | {"label_length": 2}},
    "bamba": {"with": MAMBA | {"num_hidden_layers": 2, "attn_layer_indices": [1]}},
    "bit": {"with": {"num_groups": 8}},
    "bridgetower": {"with": {"vision_config": {"hidden_size": 64}, "hidden_size": 64, "num_attention_heads": 4}},
    "dots3_note_audio_encoder": {"with": {"adapter_input_size": 32}},
    "dots3_note_vision_encoder": {"with": {"adapter_in_dim": 32}},
    "esm": {"with": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}},
    "falcon_h1": {"with": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_expand": 2}},
    "fun_asr_nano": {"with": {"adaptor_config": {"intermediate_size": 8}}},
    "gemma4_assistant": {"from": {"hidden_size_per_layer_input": 0}},
    "glm5_next": {"with": {"text_config": {"index_topk": 16}}},
    "glm5_next_text": {"with": {"index_topk": 16}},
    "glm4v_moe": {"with": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 0]}}}},
    "glm4v_moe_text": {"with": {"rope_parameters": {"mrope_section": [1, 1, 0]}}},
    "gradium_phonon_tts": {"with": {"flow_head_config": {"condition_dim": 32}}},
    "granitemoehybrid": {"with": MAMBA},
    "grounding-dino": {"with": {"backbone_config": {"num_heads": [1, 2, 4, 8]}}},
    "hunyuan_v1_dense": {"with": {"head_dim": 8}},
    "hunyuan_v1_moe": {"with": {"head_dim": 8}},
    "hunyuan_vl": {"with": {"text_config": {"head_dim": 8}}},
    "hunyuan_vl_text": {"with": {"head_dim": 8}},
    "informer": {"with": SERIES | {"label_length": 2}},
    "jamba": {
        "with": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_hidden_layers": 2}
    },
    "lilt": {"with": {"hidden_size": 48, "max_2d_position_embeddings": 128}},
    "lw_detr": {"with": {"backbone_config": {"image_size": 64}}},
    "lw_detr_vit": {"with": {"image_size": 64}},
    "mamba2": {"with": {"num_heads": 8, "head_dim": 8, "n_groups": 1}},
    "ministral": {"with": {"head_dim": 8}},
    "nemotron": {"with": {"head_dim": 8}},
    "pocket_tts": {"with": {"flow_head_config": {"condition_dim": 32}}},
    "pop2piano": {"with": {"is_decoder": False, "use_cache": False}},
    "resnet": {"with": {"depths": [2, 1, 1, 1]}},  # of a stage's blocks the first adds no stream to what it gives
    "rt_detr_resnet": {"with": {"depths": [2, 1, 1, 1]}},
    "upernet": {"with": {"backbone_config": {"depths": [2, 1, 1, 1]}}},
    "recurrent_gemma": {"with": {"num_hidden_layers": 3}},
    "step3p5": {"with": {"sliding_window": 8}},
    "step3p7": {"with": {"text_config": {"sliding_window": 8}}},
    "time_series_transformer": {"with": SERIES},
    "xmod": {"with": {"default_language": "en_XX"}},
}
CLASSES: dict[str, str] = {"rf_detr_dinov2": "RfDetrDinov2Backbone"}
INPUTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "audio-spectrogram-transformer": {"input_values": lambda facts: torch.randn(2, 1024, 16)},
    "autoformer": VALUES,
    "informer": VALUES,
    "time_series_transformer": VALUES,
    "blip_2_qformer": {"encoder_hidden_states": lambda facts: torch.randn(2, 5, facts.number("encoder_hidden_size"))},
    "decision_transformer": {
        "states": lambda facts: torch.randn(2, 7, facts.number("state_dim")),
        "actions": lambda facts: torch.randn(2, 7, facts.number("act_dim")),
        "rewards": lambda facts: torch.randn(2, 7, 1),
        "returns_to_go": lambda facts: torch.randn(2, 7, 1),
        "timesteps": lambda facts: torch.arange(7).expand(2, -1),
        "attention_mask": lambda facts: torch.ones(2, 7),
    },
    "idefics": {"pixel_values": lambda facts: torch.randn(2, 1, 3, 32, 32)},
    "perceiver": {"inputs": lambda facts: torch.randn(2, 9, facts.number("d_model"))},
    "lxmert": {
        "visual_feats": lambda facts: torch.randn(2, 3, facts.number("visual_feat_dim")),
        "visual_pos": lambda facts: torch.rand(2, 3, 4),
    },
    "wav2vec2-bert": {"input_features": lambda facts: torch.randn(2, 32, facts.number("feature_projection_input_dim"))},
    "siglip2_vision_model": {
        "pixel_values": lambda facts: torch.randn(2, 16, 48),
        "pixel_attention_mask": lambda facts: torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": lambda facts: torch.tensor([[4, 4]] * 2),
    },
    "speecht5": {"input_values": lambda facts: torch.randn(2, 7, facts.number("hidden_size"))},
    "timesfm": {
        "past_values": lambda facts: torch.randn(2, 64),
        "past_values_padding": lambda facts: torch.zeros(2, 64),
        "freq": lambda facts: torch.zeros(2, 1, dtype=torch.long),
    },
    "vilt": {"pixel_values": lambda facts: torch.randn(2, 3, 32, 32)},
    "udop": {"bbox": lambda facts: torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(2, 7, 4)},
}
