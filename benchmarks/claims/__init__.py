"""One script for each claim; each is named for it, and its `run` gives the figures beside their reach."""

CLAIMS = (
    "flops_are_loras",
    "memory_is_loras",
    "linear_step",
    "convolution_step",
    "deberta_all_linear",
    "llama_blocks",
    "eval_forward",
    "compiled",
    "growth",
    "merge_and_init_7b",
    "every_piece",
    "packing",
)
