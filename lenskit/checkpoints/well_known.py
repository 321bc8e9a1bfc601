"""Hub ids that people use, by family: what `lenskit models` shows beside each.

Nothing else reads this table. Which family a checkpoint is of says the model_type in its config.json, so a fine-tune
needs no entry. A row names the checkpoints of the family's makers, smallest first, and what is most used of others'.
"""

# Hugging Face's `model_type` -> ids, with spaces between them. A row may be here before its family is.
WELL_KNOWN = {
    "bert": "google-bert/bert-base-uncased google-bert/bert-base-cased google-bert/bert-large-uncased "
    "google-bert/bert-base-multilingual-cased",
    "bloom": "bigscience/bloom-560m bigscience/bloom-1b7 bigscience/bloom-7b1 bigscience/bloomz-560m",
    "cohere": "CohereLabs/aya-23-8B CohereLabs/aya-expanse-8b CohereLabs/c4ai-command-r-v01",
    "cohere2": "CohereLabs/c4ai-command-r7b-12-2024 CohereLabs/c4ai-command-a-03-2025",
    "deepseek_v3": "unsloth/DeepSeek-V3-bf16 unsloth/DeepSeek-R1-BF16",  # the makers' own are in 8 bits
    "falcon": "tiiuae/falcon-rw-1b tiiuae/falcon-7b tiiuae/falcon-11B tiiuae/falcon-40b",
    "gemma": "google/gemma-2b google/gemma-7b google/gemma-1.1-2b-it google/codegemma-2b",
    "gemma2": "google/gemma-2-2b google/gemma-2-2b-it google/gemma-2-9b google/gemma-2-27b",
    "gemma3_text": "google/gemma-3-270m google/gemma-3-1b-pt google/gemma-3-1b-it",
    "gpt2": "openai-community/gpt2 openai-community/gpt2-medium openai-community/gpt2-large openai-community/gpt2-xl "
    "distilbert/distilgpt2",
    "gpt_neo": "EleutherAI/gpt-neo-125m EleutherAI/gpt-neo-1.3B EleutherAI/gpt-neo-2.7B roneneldan/TinyStories-33M",
    "gpt_neox": "EleutherAI/pythia-14m EleutherAI/pythia-70m EleutherAI/pythia-160m EleutherAI/pythia-410m "
    "EleutherAI/pythia-1.4b EleutherAI/pythia-6.9b EleutherAI/pythia-12b EleutherAI/gpt-neox-20b",
    "gpt_oss": "unsloth/gpt-oss-20b-BF16 unsloth/gpt-oss-120b-BF16",  # the makers' own are in 4 bits
    "gptj": "EleutherAI/gpt-j-6b",
    "granite": "ibm-granite/granite-3.1-2b-base ibm-granite/granite-3.3-2b-instruct ibm-granite/granite-3.3-8b-base",
    "llama": "HuggingFaceTB/SmolLM2-135M TinyLlama/TinyLlama-1.1B-Chat-v1.0 meta-llama/Llama-3.2-1B "
    "meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct meta-llama/Llama-3.3-70B-Instruct "
    "meta-llama/Llama-2-7b-hf huggyllama/llama-7b deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "mistral": "mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.3 mistralai/Mistral-Nemo-Base-2407 "
    "HuggingFaceH4/zephyr-7b-beta",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1 mistralai/Mixtral-8x7B-Instruct-v0.1 mistralai/Mixtral-8x22B-v0.1",
    "mpt": "mosaicml/mpt-7b mosaicml/mpt-7b-instruct mosaicml/mpt-30b",
    "olmo": "allenai/OLMo-1B-hf allenai/OLMo-1B-0724-hf allenai/OLMo-7B-0724-hf",
    "olmo2": "allenai/OLMo-2-0425-1B allenai/OLMo-2-1124-7B allenai/OLMo-2-1124-13B allenai/OLMo-2-0325-32B",
    "olmoe": "allenai/OLMoE-1B-7B-0924 allenai/OLMoE-1B-7B-0125",
    "opt": "facebook/opt-125m facebook/opt-350m facebook/opt-1.3b facebook/opt-6.7b facebook/opt-13b",
    "phi": "microsoft/phi-1 microsoft/phi-1_5 microsoft/phi-2",
    "phi3": "microsoft/Phi-3-mini-4k-instruct microsoft/Phi-3-mini-128k-instruct microsoft/Phi-3.5-mini-instruct "
    "microsoft/Phi-4-mini-instruct microsoft/phi-4",
    "qwen2": "Qwen/Qwen2-0.5B Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-7B Qwen/Qwen2.5-Coder-7B "
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "qwen2_moe": "Qwen/Qwen1.5-MoE-A2.7B Qwen/Qwen2-57B-A14B",
    "qwen3": "Qwen/Qwen3-0.6B Qwen/Qwen3-1.7B Qwen/Qwen3-4B Qwen/Qwen3-8B Qwen/Qwen3-8B-Base",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B Qwen/Qwen3-30B-A3B-Instruct-2507 Qwen/Qwen3-235B-A22B",
    "smollm3": "HuggingFaceTB/SmolLM3-3B HuggingFaceTB/SmolLM3-3B-Base",
    "stablelm": "stabilityai/stablelm-2-1_6b stabilityai/stablelm-3b-4e1t stabilityai/stablelm-zephyr-3b",
    "starcoder2": "bigcode/starcoder2-3b bigcode/starcoder2-7b bigcode/starcoder2-15b",
}


def well_known(model_type: str) -> list[str]:
    """The family's hub ids; none where nobody wrote any down."""
    return WELL_KNOWN.get(model_type, "").split()
