"""Tiny models of the architectures that are tested from end to end, and what should be pruned in each."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from transformers import PreTrainedModel, default_data_collator

from tiny_models import SIZES


# ---- Data ----


def tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, 64, (8,), generator=generator)


def classified_text(generator: torch.Generator) -> dict:
    ids = tokens(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


def text(generator: torch.Generator) -> dict:
    ids = tokens(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def image(generator: torch.Generator) -> dict:
    pixels = torch.randn(3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": (pixels.mean() > 0).long()}


def pair(generator: torch.Generator) -> dict:
    return {"pixel_values": image(generator)["pixel_values"], "input_ids": tokens(generator)}


def speech(generator: torch.Generator) -> dict:
    return {"input_features": torch.randn(8, 16, generator=generator), "labels": tokens(generator)}


# ---- Models ----


@dataclass(frozen=True)
class Architecture:
    """
    An architecture: a class with a head, a tiny config for it, and what should be pruned.

    Args:
        name (`str`):
            Its name in the table.
        head (`str`):
            The class that a user fine-tunes.
        sizes (`dict`):
            What makes the config tiny.
        example (`Callable[[torch.Generator], dict]`):
            Makes one example to train on.
        pruned (`list[str]`):
            Modules that are pruned, in the form of `architecture_table.shorten`.
        dense (`dict[str, list[str]]`):
            Matrices that are not, by reason.
        settings (`dict`, *optional*):
            What the config sets beside sizes, in the table too.
    """

    name: str
    head: str
    sizes: dict
    example: Callable[[torch.Generator], dict]
    pruned: list[str]
    dense: dict[str, list[str]]
    settings: dict = field(default_factory=dict)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.head)

    def tiny(self, seed: int = 0) -> PreTrainedModel:
        """The tiny model. The same seed gives the same weights."""
        torch.manual_seed(seed)
        return self.model_class(self.model_class.config_class(**self.sizes, **self.settings))

    def data(self, n: int = 12) -> list[dict]:
        generator = torch.Generator().manual_seed(0)
        return [self.example(generator) for _ in range(n)]

    def collate(self, examples: list[dict]) -> dict:
        # CLIP has no labels: the other pairs of a batch are what it tells apart.
        asked = {"return_loss": True} if self.example is pair else {}
        return default_data_collator(examples) | asked


SMALL = {**SIZES, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
GROUPED = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
PICTURE = {
    **{name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "image_size": 8,
    "patch_size": 4,
}
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
}
TOKENS = {name: SMALL[name] for name in ("vocab_size", "bos_token_id", "pad_token_id", "eos_token_id")}

BERT_LAYER = ["attention.self.{query,key,value}", "attention.output.dense", "intermediate.dense", "output.dense"]
BERT_EMBEDDINGS = "embeddings.{word_embeddings,position_embeddings,token_type_embeddings}"
LLAMA_ATTENTION = ["model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}"]
LLAMA = [*LLAMA_ATTENTION, "model.layers.*.mlp.{gate_proj,up_proj,down_proj}"]
FUSED = {"fused experts (unsupported)": ["model.layers.*.mlp.experts.{gate_up_proj,down_proj}"]}
ATTENTION = "{k_proj,v_proj,q_proj,out_proj}"
BART_LAYERS = [
    f"model.encoder.layers.*.self_attn.{ATTENTION}",
    "model.encoder.layers.*.{fc1,fc2}",
    f"model.decoder.layers.*.self_attn.{ATTENTION}",
    f"model.decoder.layers.*.encoder_attn.{ATTENTION}",
    "model.decoder.layers.*.{fc1,fc2}",
]

# fmt: off
ARCHITECTURES = [
    Architecture(
        "BERT", "BertForSequenceClassification", SMALL, classified_text,
        [f"bert.encoder.layer.*.{name}" for name in BERT_LAYER],
        {"embedding": [f"bert.{BERT_EMBEDDINGS}"], "head": ["bert.pooler.dense", "classifier"]},
    ),
    Architecture(
        "RoBERTa", "RobertaForSequenceClassification", SMALL, classified_text,
        [f"roberta.encoder.layer.*.{name}" for name in BERT_LAYER],
        {
            "embedding": ["roberta.embeddings.{word_embeddings,token_type_embeddings,position_embeddings}"],
            "head": ["classifier.{dense,out_proj}"],
        },
    ),
    Architecture(
        "DistilBERT", "DistilBertForSequenceClassification",
        {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}, classified_text,
        [
            "distilbert.transformer.layer.*.attention.{q_lin,k_lin,v_lin,out_lin}",
            "distilbert.transformer.layer.*.ffn.{lin1,lin2}",
        ],
        {
            "embedding": ["distilbert.embeddings.{word_embeddings,position_embeddings}"],
            "head": ["pre_classifier", "classifier"],
        },
    ),
    Architecture(
        "DeBERTa-v2", "DebertaV2ForSequenceClassification",
        {**SMALL, "position_buckets": 4}, classified_text,
        [
            "deberta.encoder.layer.*.attention.self.{query_proj,key_proj,value_proj,pos_key_proj,pos_query_proj}",
            *[f"deberta.encoder.layer.*.{name}" for name in BERT_LAYER[1:]],
        ],
        {
            "embedding": ["deberta.embeddings.word_embeddings", "deberta.encoder.rel_embeddings"],
            "convolution": ["deberta.encoder.conv.conv"],
            "head": ["pooler.dense", "classifier"],
        },
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
            "conv_act": "gelu",
        },
    ),
    Architecture(
        "ALBERT", "AlbertForSequenceClassification",
        {**SMALL, "embedding_size": 8}, classified_text,
        [
            "albert.encoder.albert_layer_groups.*.albert_layers.*.attention.{query,key,value,dense}",
            "albert.encoder.albert_layer_groups.*.albert_layers.*.{ffn,ffn_output}",
        ],
        {
            "embedding": [f"albert.{BERT_EMBEDDINGS}"],
            "outside the layers": ["albert.encoder.embedding_hidden_mapping_in"],
            "head": ["albert.pooler", "classifier"],
        },
    ),
    Architecture(
        "GPT-2", "GPT2LMHeadModel",
        {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, text,
        ["transformer.h.*.attn.{c_attn,c_proj}", "transformer.h.*.mlp.{c_fc,c_proj}"],
        {"tied embedding": ["transformer.wte"], "embedding": ["transformer.wpe"]},
    ),
    Architecture(
        "OPT", "OPTForCausalLM",
        {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 8}, text,
        [f"model.decoder.layers.*.self_attn.{ATTENTION}", "model.decoder.layers.*.{fc1,fc2}"],
        {
            "tied embedding": ["model.decoder.embed_tokens"],
            "embedding": ["model.decoder.embed_positions"],
            "outside the layers": ["model.decoder.{project_out,project_in}"],
        },
    ),
    Architecture(
        "Llama", "LlamaForCausalLM", GROUPED, text, LLAMA,
        {"embedding": ["model.embed_tokens"], "head": ["lm_head"]},
    ),
    Architecture(
        "Qwen3", "Qwen3ForCausalLM", GROUPED, text, LLAMA,
        {"embedding": ["model.embed_tokens"], "head": ["lm_head"]},
    ),
    Architecture("Gemma", "GemmaForCausalLM", GROUPED, text, LLAMA, {"tied embedding": ["model.embed_tokens"]}),
    Architecture(
        "Mixtral", "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4}, text, LLAMA_ATTENTION,
        {"embedding": ["model.embed_tokens"], "router": ["model.layers.*.mlp.gate"], **FUSED, "head": ["lm_head"]},
    ),
    Architecture(
        "Qwen3-MoE", "Qwen3MoeForCausalLM",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, text, LLAMA_ATTENTION,
        {"embedding": ["model.embed_tokens"], **FUSED, "router": ["model.layers.*.mlp.gate"], "head": ["lm_head"]},
    ),
    Architecture(
        "T5", "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}, text,
        [
            "encoder.block.*.layer.*.SelfAttention.{q,k,v,o}",
            "encoder.block.*.layer.*.DenseReluDense.{wi,wo}",
            "decoder.block.*.layer.*.SelfAttention.{q,k,v,o}",
            "decoder.block.*.layer.*.EncDecAttention.{q,k,v,o}",
            "decoder.block.*.layer.*.DenseReluDense.{wi,wo}",
        ],
        {
            "tied embedding": ["shared"],
            "embedding": [
                f"{side}.block.*.layer.*.SelfAttention.relative_attention_bias" for side in ("encoder", "decoder")
            ],
        },
        {"decoder_start_token_id": 0},
    ),
    Architecture(
        "BART", "BartForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "max_position_embeddings": 32, **SIDES}, text, BART_LAYERS,
        {
            "tied embedding": ["model.shared"],
            "embedding": ["model.encoder.embed_positions", "model.decoder.embed_positions"],
        },
    ),
    Architecture(
        "ViT", "ViTForImageClassification", PICTURE, image,
        ["vit.layers.*.attention.{q_proj,k_proj,v_proj,o_proj}", "vit.layers.*.mlp.{fc1,fc2}"],
        {
            "not a linear layer": ["vit.embeddings.{cls_token,position_embeddings}"],
            "convolution": ["vit.embeddings.patch_embeddings.projection"],
            "head": ["classifier"],
        },
    ),
    Architecture(
        "CLIP", "CLIPModel",
        {"text_config": SMALL, "vision_config": PICTURE, "projection_dim": 16}, pair,
        [
            f"{side}_model.encoder.layers.*.{name}"
            for side in ("text", "vision")
            for name in (f"self_attn.{ATTENTION}", "mlp.{fc1,fc2}")
        ],
        {
            "embedding": [
                "text_model.embeddings.{token_embedding,position_embedding}",
                "vision_model.embeddings.position_embedding",
            ],
            "convolution": ["vision_model.embeddings.patch_embedding"],
            "outside the layers": ["visual_projection", "text_projection"],
        },
    ),
    Architecture(
        "Whisper", "WhisperForConditionalGeneration",
        {**TOKENS, **SIDES, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
        | {"decoder_start_token_id": 1}, speech, BART_LAYERS,
        {
            "convolution": ["model.encoder.{conv1,conv2}"],
            "embedding": ["model.encoder.embed_positions", "model.decoder.embed_positions"],
            "tied embedding": ["model.decoder.embed_tokens"],
        },
    ),
]
# fmt: on
