"""Evaluate a language model on tasks of lm-evaluation-harness, where that is installed (pip install lm-eval).

    python scripts/lm_eval_tasks.py folder --tasks hellaswag arc_easy --out results.json
    python scripts/lm_eval_tasks.py folder --tasks mine.yaml --device cpu   # a task of your own

The folder is one of export_llm.py, or any of a model and a tokenizer that transformers reads. Tiles over the batch with
an inexact basis let the requests of a batch disturb each other: their scores depend on --batch-size.
"""

from pathlib import Path

from benchmarking import run_main
from command_line import command_line

from models.callbacks import write_json
from stl import SettingError
from stl.optional import optional


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="what export_llm.py or save_pretrained wrote")
    parser.add_argument(
        "--tasks", nargs="+", required=True, help="names that lm-evaluation-harness knows, or folders of tasks"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="examples at once")
    parser.add_argument("--limit", type=int, help="examples of each task, for a trial")
    parser.add_argument("--device", default="cuda", help="where the model runs")
    parser.add_argument("--out", type=Path, default=Path("lm_eval.json"), help="JSON to write")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").is_file():
        raise SettingError(f"{arguments.folder} has no config.json; give a folder of scripts/export_llm.py")
    harness = optional("lm_eval", "lm_eval_tasks.py", "pip install lm-eval")
    wrapper = optional("lm_eval.models.huggingface", "lm_eval_tasks.py", "pip install lm-eval").HFLM
    transformers = optional("transformers", "lm_eval_tasks.py")
    optional("models.language.llama", "lm_eval_tasks.py")  # makes STL layers known to transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.folder).to(arguments.device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.folder)
    wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    found = harness.simple_evaluate(model=wrapped, tasks=arguments.tasks, limit=arguments.limit)
    write_json(arguments.out, {"folder": str(arguments.folder), "results": found["results"]})
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    run_main(main)
