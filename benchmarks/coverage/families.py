"""The families: a class of `transformers` and the settings that make it tiny; weights are random.

Sizes that are not named here are the family's own: heads, norms, activations, positions. Everything
has two layers (or stages) and is 32 to 64 wide.
"""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA = {**TEXT, "num_key_value_heads": 2}
MOE = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PAIR: dict[str, Any] = {
    "vocab_size": 96, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "num_labels": 7,
}  # fmt: skip
STAGES: dict[str, Any] = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32,
                          "patch_size": 4, "window_size": 4, "num_labels": 7}  # fmt: skip
SOUND: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "conv_dim": [32, 32, 32], "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 4, 4], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
INNER_TEXT = {k: v for k, v in TEXT.items() if k != "pad_token_id"}
INNER_IMAGE = {k: v for k, v in IMAGE.items() if k != "num_labels"}
TWO_TOWERS: dict[str, Any] = {
    "text_config": INNER_TEXT, "vision_config": INNER_IMAGE, "projection_dim": 32,
}  # fmt: skip

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", TEXT),
    "bert-fp16": ("BertModel", {**TEXT, "dtype": "float16"}),
    "roberta": ("RobertaForSequenceClassification", {**TEXT, "num_labels": 3}),
    "xlm-roberta": ("XLMRobertaModel", TEXT),
    "camembert": ("CamembertForTokenClassification", TEXT),
    "distilbert": ("DistilBertModel", {
        "vocab_size": 96, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
        "max_position_embeddings": 64}),
    "albert": ("AlbertForMaskedLM", {**TEXT, "embedding_size": 24}),
    "electra": ("ElectraForPreTraining", {**TEXT, "embedding_size": 24}),
    "deberta": ("DebertaModel", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p"]}),
    "deberta-v2": ("DebertaV2ForMaskedLM", TEXT),
    "mpnet": ("MPNetModel", TEXT),
    "modernbert": ("ModernBertForMaskedLM", TEXT),
    "nomic_bert": ("NomicBertModel", TEXT),
    "eurobert": ("EuroBertModel", LLAMA),
    "esm": ("EsmModel", {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 4}),
    "funnel": ("FunnelModel", {
        "vocab_size": 96, "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 64,
        "block_sizes": [1, 1]}),
    "longformer": ("LongformerModel", {**TEXT, "attention_window": [4, 4]}),
    "big_bird": ("BigBirdModel", {**TEXT, "attention_type": "original_full"}),
    "convbert": ("ConvBertModel", {**TEXT, "embedding_size": 48}),
    "squeezebert": ("SqueezeBertModel", {**TEXT, "embedding_size": 48}),
    "mobilebert": ("MobileBertModel", {
        **TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    "fnet": ("FNetModel", TEXT),
    "xlnet": ("XLNetModel", {
        "vocab_size": 96, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "layoutlm": ("LayoutLMModel", TEXT),
    "nystromformer": ("NystromformerModel", {
        **TEXT, "segment_means_seq_len": 16, "num_landmarks": 8}),
    "roformer": ("RoFormerModel", {**TEXT, "embedding_size": 48}),
    "tapas": ("TapasModel", TEXT),
    "canine": ("CanineModel", {**TEXT, "num_hash_buckets": 64, "local_transformer_stride": 8}),
}  # fmt: skip
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {
        "vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neo": ("GPTNeoForCausalLM", {
        "vocab_size": 96, "hidden_size": 48, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
        "window_size": 8, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "gptj": ("GPTJForCausalLM", {
        "vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {
        "vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTForCausalLM", {
        "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 48}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 96, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", TEXT),
    "mpt": ("MptForCausalLM", {
        "vocab_size": 96, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "codegen": ("CodeGenForCausalLM", {
        "vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-bf16-tied": ("LlamaForCausalLM", {
        **LLAMA, "tie_word_embeddings": True, "dtype": "bfloat16"}),
    "mistral": ("MistralForCausalLM", LLAMA),
    "mixtral": ("MixtralForCausalLM", {
        **LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {
        **MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 12}),
    "gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", {**LLAMA, "head_dim": 12, "sliding_window": 8}),
    "phi": ("PhiForCausalLM", TEXT),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "stablelm": ("StableLmForCausalLM", {**LLAMA, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2ForCausalLM", LLAMA),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "olmoe": ("OlmoeForCausalLM", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereForCausalLM", LLAMA),
    "granite": ("GraniteForCausalLM", LLAMA),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {
        **LLAMA, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
        "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1}),
    "mamba": ("MambaForCausalLM", {
        "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": ("Mamba2ForCausalLM", {
        "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8,
        "num_heads": 8, "head_dim": 12, "n_groups": 2, "chunk_size": 8}),
    "rwkv": ("RwkvForCausalLM", {
        "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "attention_hidden_size": 48,
        "intermediate_size": 64, "context_length": 64}),
    "biogpt": ("BioGptForCausalLM", TEXT),
    "xglm": ("XGLMForCausalLM", {
        "vocab_size": 96, "d_model": 48, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64,
        "max_position_embeddings": 64}),
    "ctrl": ("CTRLLMHeadModel", {
        "vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "dff": 64, "n_positions": 64}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {
        "vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}  # fmt: skip
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "t5-encoder": ("T5EncoderModel", T5),
    "longt5": ("LongT5ForConditionalGeneration", {**T5, "local_radius": 4}),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", {
        **T5, "num_decoder_layers": 2, "num_experts": 4}),
    "bart": ("BartForConditionalGeneration", PAIR),
    "mbart": ("MBartForConditionalGeneration", PAIR),
    "marian": ("MarianMTModel", PAIR),
    "pegasus": ("PegasusForConditionalGeneration", PAIR),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", PAIR),
    "m2m_100": ("M2M100ForConditionalGeneration", PAIR),
    "prophetnet": ("ProphetNetForConditionalGeneration", {
        "vocab_size": 96, "hidden_size": 48, "encoder_ffn_dim": 64, "num_encoder_layers": 2,
        "num_encoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4, "max_position_embeddings": 64}),
    "led": ("LEDForConditionalGeneration", {
        **{k: v for k, v in PAIR.items() if k != "max_position_embeddings"},
        "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64,
        "attention_window": 4}),
}  # fmt: skip
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", IMAGE),
    "deit": ("DeiTForImageClassification", IMAGE),
    "beit": ("BeitForImageClassification", {**IMAGE, "out_indices": [1, 2]}),
    "dinov2": ("Dinov2Model", {**IMAGE, "mlp_ratio": 2}),
    "vit_mae": ("ViTMAEModel", {**IMAGE, "mask_ratio": 0.0}),
    "vit_msn": ("ViTMSNModel", IMAGE),
    "swin": ("SwinForImageClassification", STAGES),
    "swinv2": ("Swinv2ForImageClassification", STAGES),
    "convnext": ("ConvNextForImageClassification", {
        "hidden_sizes": [32, 48], "depths": [1, 1], "num_stages": 2, "image_size": 32,
        "num_labels": 7}),
    "convnextv2": ("ConvNextV2ForImageClassification", {
        "hidden_sizes": [32, 48], "depths": [1, 1], "num_stages": 2, "image_size": 32,
        "num_labels": 7}),
    "resnet": ("ResNetForImageClassification", {
        "embedding_size": 32, "hidden_sizes": [32, 48], "depths": [1, 1], "layer_type": "basic",
        "num_labels": 7}),
    "regnet": ("RegNetForImageClassification", {
        "embedding_size": 32, "hidden_sizes": [32, 48], "depths": [1, 1], "groups_width": 16,
        "num_labels": 7}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {
        "depth_multiplier": 0.35, "image_size": 32, "num_labels": 7}),
    "poolformer": ("PoolFormerForImageClassification", {
        "hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 1, 1], "num_labels": 7}),
    "segformer": ("SegformerForSemanticSegmentation", {
        "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [32, 48], "sr_ratios": [2, 1],
        "num_attention_heads": [2, 4], "patch_sizes": [7, 3], "strides": [4, 2],
        "mlp_ratios": [2, 2], "decoder_hidden_size": 32, "num_labels": 7}),
    "pvt_v2": ("PvtV2ForImageClassification", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 48],
        "num_attention_heads": [1, 2, 2, 4], "image_size": 32, "num_labels": 7}),
    "yolos": ("YolosForObjectDetection", {
        **IMAGE, "image_size": [32, 32], "num_detection_tokens": 4}),
    "videomae": ("VideoMAEForVideoClassification", {
        **IMAGE, "num_frames": 4, "tubelet_size": 2}),
}  # fmt: skip
SOUNDS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2ForCTC", SOUND),
    "hubert": ("HubertModel", SOUND),
    "wavlm": ("WavLMModel", SOUND),
    "unispeech": ("UniSpeechModel", SOUND),
    "data2vec-audio": ("Data2VecAudioModel", SOUND),
    "sew": ("SEWModel", {**SOUND, "squeeze_factor": 2}),
    "wav2vec2-bert": ("Wav2Vec2BertModel", {**SOUND, "feature_projection_input_dim": 32}),
    "whisper": ("WhisperForConditionalGeneration", {
        **{k: v for k, v in PAIR.items() if k != "max_position_embeddings"}, "num_mel_bins": 16,
        "max_source_positions": 32, "max_target_positions": 32}),
    "speech_to_text": ("Speech2TextForConditionalGeneration", {
        **{k: v for k, v in PAIR.items() if k != "max_position_embeddings"},
        "max_source_positions": 64, "max_target_positions": 32, "conv_channels": 32,
        "input_feat_per_channel": 16}),
    "audio-spectrogram-transformer": ("ASTForAudioClassification", {
        **{k: v for k, v in IMAGE.items() if k != "image_size"}, "num_mel_bins": 16,
        "max_length": 64}),
    "encodec": ("EncodecModel", {
        "hidden_size": 32, "num_filters": 4, "upsampling_ratios": [2, 2], "num_lstm_layers": 1,
        "codebook_size": 16}),
}  # fmt: skip
MANY: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPModel", TWO_TOWERS),
    "siglip": ("SiglipModel", {k: v for k, v in TWO_TOWERS.items() if k != "projection_dim"}),
    "blip": ("BlipForConditionalGeneration", {
        "text_config": {**INNER_TEXT, "encoder_hidden_size": 48, "sep_token_id": 2},
        "vision_config": INNER_IMAGE}),
    "vilt": ("ViltModel", {**IMAGE, "vocab_size": 96, "max_position_embeddings": 64}),
    "git": ("GitForCausalLM", {**TEXT, "vision_config": INNER_IMAGE}),
    "llava": ("LlavaForConditionalGeneration", {
        "text_config": {**LLAMA, "model_type": "llama"},
        "vision_config": {**INNER_IMAGE, "model_type": "clip_vision_model"},
        "image_token_index": 95, "vision_feature_layer": -1}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {
        "text_config": {**LLAMA, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2,
                          "patch_size": 8}}),
    "vision-encoder-decoder": ("VisionEncoderDecoderModel", {
        "encoder": {**INNER_IMAGE, "model_type": "vit"},
        "decoder": {**TEXT, "model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1}),
}  # fmt: skip

FAMILIES = ENCODERS | DECODERS | PAIRS | IMAGES | SOUNDS | MANY
