"""Step-1 as a transformers model: `Step1Config`, `Step1Model`, `Step1ForCausalLM`, under the release's key names.

Knows nothing about text, prompts, sampling or sound: token ids in, logits out. Importing this module teaches
AutoConfig and AutoModelForCausalLM the model type "step1", so release folders load without remote code.
Llama's layout without rotary positions: order comes from square-root ALiBi alone (`attention.py`).

Legend: B batch, S new tokens, W hidden width, H query heads, G key/value groups, D head width, V vocabulary.
Source: formats.md sections 2 and 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, create_causal_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from stepaudio.lm.attention import Position, local_slopes, sqrt_alibi_attention
from stepaudio.lm.geometry import Geometry
from stepaudio.lm.shards import borrowed_index
from tokenizer.errors import RequestError

PLAIN_ATTENTION = "sqrt_alibi"
ALIBI_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Attend = Callable[..., tuple[Tensor, None]]  # with the signature of `sqrt_alibi_attention`
_attentions: dict[str, Attend] = {}


class Step1Config(PreTrainedConfig):
    """Sizes of a Step-1 model, with the key names of the release's config.json and the original's defaults.

    `alibi_dtype` is ours: "float32" (default) or "bfloat16", which rounds the position bias as the original does.
    Embeddings are never tied, whatever the file says: the release has no such key, and transformers' default for
    it would replace lm_head. Raises CheckpointError for sizes that make no model.
    """

    model_type = "step1"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "num_key_value_heads": "num_attention_groups",
        "max_position_embeddings": "max_seq_len",
    }
    # Query heads split in contiguous blocks, so the tensor-parallel size must divide num_attention_groups.
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 65536
    hidden_size: int = 5120
    intermediate_size: int = 13312
    num_attention_heads: int = 40
    num_attention_groups: int = 8
    num_hidden_layers: int = 48
    max_seq_len: int = 4096
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 3
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False
    alibi_dtype: str = "float32"

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # names of remote code that is not needed
        self.tie_word_embeddings = False
        Geometry(**{field.name: getattr(self, field.name) for field in fields(Geometry)})
        if self.alibi_dtype not in ALIBI_DTYPES:
            raise RequestError(f"alibi_dtype {self.alibi_dtype!r} must be one of {', '.join(ALIBI_DTYPES)}")
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Position = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: object,
) -> Tensor | None:
    """The mask an implementation is given: None or bool [B, kv_length] for plain causal attention.

    Causality stays with the bias, so no square mask is built. Other patterns (packed sequences) come as
    bool [B, 1, q_length, kv_length]. Raises RequestError for a mask that leaves out cached tokens.
    """
    if mask_function is not causal_mask_function:
        options |= {"allow_is_causal_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options)
    if attention_mask is None:
        return None
    length = attention_mask.shape[1]
    if isinstance(q_offset, int) and length < q_offset + q_length:
        raise RequestError(
            f"attention_mask covers {length} tokens, but {q_offset} cached and {q_length} new ones are attended to: "
            "give it one entry for each"
        )
    return F.pad(attention_mask[:, :kv_length], (0, max(0, kv_length - length)), value=False)


def register_attention(name: str, implementation: Attend) -> None:
    """Makes `attn_implementation=name` run `implementation`, which takes what `sqrt_alibi_attention` takes."""
    AttentionInterface.register(name, implementation)
    AttentionMaskInterface.register(name, key_mask)
    _attentions[name] = implementation


def attention_name(requested: str | None) -> str:
    """The implementation to use; RequestError for one that does not know the bias (it would give noise)."""
    if requested is None:
        return PLAIN_ATTENTION
    if requested not in _attentions:
        raise RequestError(
            f"attn_implementation {requested!r} has no square-root ALiBi bias, without which Step-1 gives noise: "
            f"leave it out or choose one of {', '.join(sorted(_attentions))}"
        )
    return requested


class Step1RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight; the mean in float32, both products in the dtype of x (formats.md 3.2)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        variance = hidden.float().pow(2).mean(-1, keepdim=True)
        return hidden * torch.rsqrt(variance + self.eps).to(hidden.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Step1MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Step1Attention(nn.Module):
    """Grouped-query attention; query head h reads group h // (H / G). The bias comes with the implementation."""

    def __init__(self, config: Step1Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width, shared = config.hidden_size, config.num_attention_groups * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, shared, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        query_start: Position = 0,
        **kwargs: Any,
    ) -> Tensor:
        """[B, S, W] -> [B, S, W]; `query_start` tokens are in the cache already."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden).view(shape).transpose(1, 2)
        key = self.k_proj(hidden).view(shape).transpose(1, 2)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sqrt_alibi_attention)
        output, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            slopes=local_slopes(self.config.num_attention_heads, query.shape[1], query.device),
            query_start=query_start,
            alibi_dtype=ALIBI_DTYPES[self.config.alibi_dtype],
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden.shape[:-1], -1))


class Step1DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Step1Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Step1Attention(config, layer_idx)
        self.mlp = Step1MLP(config)
        self.input_layernorm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **kwargs)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Step1PreTrainedModel(PreTrainedModel):
    """What transformers must know to load, place, split and train the model."""

    config_class = Step1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Step1DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Step1DecoderLayer}  # noqa: RUF012

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Only implementations that know the bias; RequestError for any other."""
        return attention_name(requested_attention)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' own, and folders of shards without an index as well."""
        with borrowed_index(pretrained_model_name_or_path) as folder:
            loaded = super().from_pretrained(folder, *args, **kwargs)
        if folder != pretrained_model_name_or_path:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded


class Step1Model(Step1PreTrainedModel):
    """Embedding, layers and the last norm: ids [B, S] -> hidden [B, S, W]."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Step1DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`attention_mask` [B, cached + S], 0 for padding; `position_ids` only tell packed sequences apart."""
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        query_start = 0 if past_key_values is None else past_key_values.get_seq_length()
        if isinstance(query_start, Tensor):
            query_start = query_start.clone()  # a static cache counts up in place
        mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values, position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden, attention_mask=mask, past_key_values=past_key_values, query_start=query_start, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class Step1ForCausalLM(Step1PreTrainedModel, GenerationMixin):
    """The language model: ids [B, S] -> logits [B, S, V], and the loss when `labels` are given.

    `lm_head` and the embedding are two matrices: no tied-weights key exists that could join them (formats.md 3.6).
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: Step1Config) -> None:
        super().__init__(config)
        self.model = Step1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`labels` [B, S] are shifted inside, -100 is ignored; `logits_to_keep` last positions (0: all) or indices."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


register_attention(PLAIN_ATTENTION, sqrt_alibi_attention)
AutoConfig.register(Step1Config.model_type, Step1Config)
AutoModel.register(Step1Config, Step1Model)
AutoModelForCausalLM.register(Step1Config, Step1ForCausalLM)
