"""Tiny published pipelines with random weights, written as diffusers writes them, and what they say."""

import json

import parity

WORDS = "a cat walks on the grass realistic red dog runs over snow slowly , . bad blurry".split()


def tokenizer(**special):
    """A tokenizer of whole words, pieces of unknown ones; its files are all that AutoTokenizer needs."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    ends = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", **special
    )


VOCAB = len(WORDS) + 4


def hunyuan_video(folder, guidance=True):
    """A diffusers HunyuanVideoPipeline, saved to `folder`."""
    import diffusers
    import transformers

    dims = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=20, num_attention_heads=4)
    llama = transformers.LlamaConfig(**dims, num_hidden_layers=4, num_key_value_heads=2, pad_token_id=0)
    clip = transformers.CLIPTextConfig(**dims, num_hidden_layers=2, max_position_embeddings=77, eos_token_id=3)
    models = dict(
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=1,
            text_embed_dim=24,
            pooled_projection_dim=24,
            rope_axes_dim=(4, 6, 6),
            guidance_embeds=guidance,
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        text_encoder=transformers.LlamaModel(llama),
        text_encoder_2=transformers.CLIPTextModel(clip),
    )
    return saved(
        folder,
        diffusers.HunyuanVideoPipeline(
            **{name: parity.randomised(model) for name, model in models.items()},
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        ),
    )


def wan(folder, experts=1, image=False, each=False, euler=False):
    """A diffusers Wan pipeline: of text or of an image, with one expert or two, or with a time for each frame.

    As published with UniPC, or with Euler.
    """
    import diffusers
    import transformers

    residual = (
        dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, decoder_base_dim=12) if each else {}
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.0, 1.2], **residual,
        **(dict(scale_factor_spatial=16) if each else {}),
    )  # fmt: skip
    of_image = image and not each
    with_tokens = of_image and experts == 1

    def transformer(seed):
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=12 if of_image else 4, out_channels=4,
            text_dim=24, ffn_dim=20, num_layers=2, image_dim=16 if with_tokens else None,
            added_kv_proj_dim=24 if with_tokens else None,
        )  # fmt: skip
        return parity.randomised(model, seed)

    t5 = transformers.UMT5Config(
        vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=20, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    unipc = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    parts = dict(
        tokenizer=tokenizer(),
        text_encoder=parity.randomised(transformers.UMT5EncoderModel(t5)),
        vae=parity.randomised(vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0) if euler else unipc,
        transformer=transformer(0),
        transformer_2=transformer(1) if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        expand_timesteps=each,
    )
    if not image:
        return saved(folder, diffusers.WanPipeline(**parts))
    parts |= dict(image_encoder=None, image_processor=None)
    if with_tokens:
        vision = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=28,
            patch_size=14, hidden_act="gelu",
        )  # fmt: skip
        parts["image_encoder"] = parity.randomised(transformers.CLIPVisionModel(vision))
        parts["image_processor"] = transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
    return saved(folder, diffusers.WanImageToVideoPipeline(**parts))


def saved(folder, pipe):
    """The pipeline, quiet, after it was saved."""
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == type(pipe).__name__
    return pipe
