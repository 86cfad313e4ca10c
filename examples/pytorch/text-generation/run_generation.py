"""Writes on from a prompt, with a trained adapter if one is given.

    python run_generation.py --model_type=gpt2 --model_name_or_path=gpt2 --prompt "Once upon a time" \
        --load_adapter out/poems

`python run_generation.py --help` has every option.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

import adapters
from adapters.errors import AdapterError

MODEL_TYPES = ("gpt2", "ctrl", "openai-gpt", "xlnet", "xlm", "gptj", "bloom", "llama", "opt")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Writes on from a prompt.")
    parser.add_argument("--model_type", help=f"Told by the model itself; as in 1.x, such as {', '.join(MODEL_TYPES)}.")
    parser.add_argument("--model_name_or_path", required=True, help="A name on the Hub or a local folder.")
    parser.add_argument("--load_adapter", help="Trained adapter: a folder, an URL or a name on the Hub.")
    parser.add_argument("--prompt", default="", help="Where the text begins; asked for if it is not given.")
    parser.add_argument("--length", type=int, default=20, help="Number of new tokens.")
    parser.add_argument("--stop_token", help="The text ends before this.")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token each time.")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="1.2 is what CTRL is made for.")
    parser.add_argument("--k", type=int, default=0, help="Sample from the k most likely tokens; 0 is from all.")
    parser.add_argument("--p", type=float, default=0.9, help="Sample from the tokens that make up this share.")
    parser.add_argument("--prefix", default="", help="Text that the model reads before the prompt.")
    parser.add_argument("--padding_text", default="", help="Old name of --prefix.")
    parser.add_argument("--xlm_language", default="", help="Language of XLM's text.")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--use_cpu", "--no_cuda", action="store_true", help="Use no GPU.")
    parser.add_argument("--num_return_sequences", type=int, default=1, help="Number of texts.")
    parser.add_argument("--fp16", action="store_true", help="Half precision.")
    parser.add_argument("--jit", action="store_true", help="Compile the model with torch.compile.")
    arguments = parser.parse_args()
    for name, least in {"length": 1, "num_return_sequences": 1, "k": 0, "temperature": 0}.items():
        if (value := vars(arguments)[name]) < least:
            raise AdapterError(f"{name}={value}: it is too small; it must be at least {least}.")
    if not 0 < arguments.p <= 1:
        raise AdapterError(f"p={arguments.p}: it is no share; it must be above 0 and at most 1.")
    return arguments


def load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    dtype = torch.float16 if arguments.fp16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=dtype)
    if arguments.model_type and arguments.model_type != model.config.model_type:
        raise AdapterError(
            f"model_type={arguments.model_type!r}: the model is a {model.config.model_type!r}; leave the option out."
        )
    if arguments.xlm_language:
        languages = model.config.to_dict().get("lang2id", {})
        if arguments.xlm_language not in languages:
            known = ", ".join(languages) or "that of no language"
            raise AdapterError(f"xlm_language={arguments.xlm_language!r}: unknown; the model knows {known}.")
        model.config.lang_id = languages[arguments.xlm_language]
    if arguments.load_adapter:
        adapters.init(model)
        model.load_adapter(arguments.load_adapter, load_as="generation", set_active=True)
    model.to("cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu").eval()
    if arguments.jit:
        model.compile()
    return model


def generate(model: PreTrainedModel, arguments: argparse.Namespace, prompt: str) -> list[str]:
    """The prompt with what the model writes on, without the prefix and what follows the stop token."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    prefix = arguments.prefix or arguments.padding_text
    ends = model.config.model_type in ("xlm", "xlnet")  # their special tokens would end the text
    inputs = tokenizer(prefix + prompt, add_special_tokens=not ends, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise AdapterError("prompt='': it has no token; it must have at least one.")
    sampled = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.k, "top_p": arguments.p}
    texts = model.generate(
        **inputs,
        **(sampled if arguments.temperature > 0 else {"do_sample": False, "num_beams": arguments.num_return_sequences}),
        max_new_tokens=arguments.length,
        repetition_penalty=arguments.repetition_penalty,
        num_return_sequences=arguments.num_return_sequences,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    written = tokenizer.batch_decode(texts[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    stop = arguments.stop_token
    return [prompt + (text.split(stop)[0] if stop else text) for text in written]


def main() -> None:
    arguments = parse_arguments()
    set_seed(arguments.seed)
    model = load_model(arguments)
    prompt = arguments.prompt or input("Model prompt >>> ")
    for number, text in enumerate(generate(model, arguments, prompt), start=1):
        print(f"=== GENERATED SEQUENCE {number} ===")
        print(text)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_generation.py: {error}")
