"""The commands that send retrieved candidates to a generator and score its answers. cli.py calls `add_parsers`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import DONE, print_json

if TYPE_CHECKING:
    from pipeline.generation.answers import Job
    from pipeline.generation.chat import ChatService
    from pipeline.generation.model import Model

_STYLES = ("captioning", "image-prompt", "question")
_SCORES = {"captioning": ("bleu", "rouge_l", "cider"), "question": ("exact_match", "token_f1", "rouge_l"),
           "image-prompt": ()}


def add_parsers(subcommands: Any) -> None:
    generate = _command(subcommands, "generate", _generate,
                        "send retrieved candidates to an OpenAI-compatible server; keep and score its answers")
    generate.add_argument("--messages", type=Path, metavar="FILE",
                          help='send these instead: lines of {"query_id": ..., "messages": [...]}')
    for name in ("task", "pool", "encoder"):
        generate.add_argument(f"--{name}", help="of the results to send, where the experiment has several")
    generate.add_argument("--top", type=int, default=5, metavar="K", help="candidates shown (default: 5; 0: none)")
    generate.add_argument("--style", choices=_STYLES, default="question", help="default: question")
    generate.add_argument("--prompt", help="the words of the task, instead of the style's")
    generate.add_argument("--references", type=Path, metavar="FILE",
                          help='lines of {"query_id": ..., "references": [...]}; default: texts of relevant candidates')
    generate.add_argument("--metric", action="append", metavar="NAME",
                          help="bleu, rouge_l, cider, exact_match or token_f1; may be repeated (default: by style)")
    caption = _command(subcommands, "caption", _caption,
                       "describe every picture of a benchmark by such a server: it becomes text retrieval")
    caption.add_argument("--task", action="append", default=[], metavar="NAME", help="may be repeated (default: all)")
    caption.add_argument("--prompt", help="what the model is told to do with a picture")


def _command(subcommands: Any, name: str, run: Any, text: str) -> Any:
    command = subcommands.add_parser(name, help=text, description=text)
    command.add_argument("experiment", metavar="EXPERIMENT", help="a name in configs/experiments, or a .yaml file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="any option of the experiment")
    command.add_argument("--url", required=True, help="of the server, such as http://localhost:8000/v1")
    command.add_argument("--model", required=True, help="its name, as the server knows it")
    command.add_argument("--key-variable", metavar="NAME", help="environment variable with the key (default: no key)")
    command.add_argument("--service", metavar="LABEL", help="what answers are known by instead of the URL's host")
    command.add_argument("--max-tokens", type=int, metavar="N", help="of an answer")
    command.add_argument("--temperature", type=_temperature, default=0.0, help="default: 0; none: not sent")
    command.add_argument("--request", metavar="JSON", help="""more fields of each request, such as '{"seed": 1}'""")
    command.add_argument("--image-max-side", type=_positive, default=1024, metavar="N", help="pixels (default: 1024)")
    command.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    command.add_argument("--requests-per-minute", type=int, metavar="N", help="default: no bound")
    command.add_argument("--retries", type=int, default=6, metavar="N", help="after the first attempt (default: 6)")
    command.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds (default: 120)")
    command.add_argument("--tolerate", type=int, default=0, metavar="N", help="queries without answer (default: 0)")
    command.add_argument("--price-input", type=float, metavar="P", help="of a million tokens sent")
    command.add_argument("--price-output", type=float, metavar="P", help="of a million tokens answered")
    command.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _temperature(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor none") from None


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _generate(options: Any) -> int:
    from pipeline.generation import generating, scoring, text_scores
    from pipeline.generation.questions import Asking
    from pipeline.plan import make_plan
    from pipeline.support.errors import UserError
    experiment = _experiment(options)
    metrics = options.metric or (_SCORES[options.style] if not options.messages or options.references else ())
    text_scores.check(metrics)
    model = _model(options)
    references: Any = scoring.read_references(options.references) if options.references else None
    if options.messages and metrics and references is None:
        raise UserError("messages come without references", "--metric", "name the texts: --references FILE")
    if options.messages:
        job = generating.from_messages(experiment, options.messages, model)
    else:
        cell = generating.chosen_cell(make_plan(experiment), options.encoder, options.task, options.pool)
        asking = Asking(options.style, options.top, options.prompt, options.image_max_side)
        job = generating.from_cell(experiment, cell, model, asking)
        references = references or (scoring.relevant_texts(cell.job) if metrics else None)
    found = _answered(options, [job], _connected(options, model))[0]
    if metrics:
        chosen = experiment.settings.score
        interval = scoring.Interval(chosen.confidence, chosen.resamples, chosen.seed)
        found["scores"] = scoring.score(job.artifact, references, metrics, interval)
    print_json(options, found) if options.json else print(_text(found))
    return DONE


def _caption(options: Any) -> int:
    from pipeline.generation import captioning
    from pipeline.generation.questions import DESCRIBE
    from pipeline.plan import make_plan
    from pipeline.workers import run_stage
    experiment, model = captioning.only(_experiment(options), options.task), _model(options)
    service = _connected(options, model)
    run_stage(experiment, "collect")
    plan, prompt = make_plan(experiment), options.prompt or DESCRIBE
    done = captioning.captionings(plan, model, prompt, options.image_max_side)
    found = _answered(options, [each.job for each in done if each.job is not None], service)
    path = captioning.write_benchmark(experiment, done)
    if options.json:
        print_json(options, {"captions": found, "benchmark": str(path)})
    else:
        print("\n".join([*map(_text, found), f"benchmark  {path}"]))
    return DONE


def _experiment(options: Any) -> Any:
    from pipeline.config import load
    from pipeline.support.logs import configure
    experiment = load(options.experiment, options.overrides)
    configure(experiment.directory / "logs" / "generate.log", quiet=options.json)
    return experiment


def _model(options: Any) -> Model:
    from pipeline.generation.model import Model, request_of
    request = request_of(options.request, options.max_tokens, options.temperature)
    return Model(options.url, options.model, request, options.service, options.key_variable)


def _connected(options: Any, model: Model) -> ChatService:
    from pipeline.support.http import Patience
    return model.connect(Patience(options.concurrency, options.retries, options.timeout, options.requests_per_minute))


def _answered(options: Any, jobs: list[Job], service: ChatService) -> list[dict[str, Any]]:
    """Ask what is missing of each job; what its manifest tells, and the cost."""
    from pipeline.artifacts import sweep_temporaries
    from pipeline.generation import answers
    from pipeline.generation.generating import cost_of
    from pipeline.support.progress import follow
    found = []
    for job in jobs:
        sweep_temporaries(job.artifact.directory)
        if not answers.is_accepted(job, options.tolerate):
            landed = answers.make(job, service.answer, options.concurrency, options.tolerate)
            for _ in follow("generate", landed, job.num_shards):
                pass
        manifest = job.artifact.manifest()
        wanted = ("queries", "answered", "failed", "cut_off", "without_token_counts", "prompt_tokens",
                  "completion_tokens")
        found.append({"answers": str(job.artifact.directory), **{name: manifest[name] for name in wanted},
                      "cost": cost_of(manifest, options.price_input, options.price_output)})
    return found


def _text(found: dict[str, Any]) -> str:
    """What was answered, in a few lines."""
    cost = "" if found["cost"] is None else f", cost {found['cost']:.4f}"
    lines = [f"answers    {found['answers']}",
             f"           {found['answered']:,} of {found['queries']:,} queries answered; tokens: "
             f"{found['prompt_tokens']:,} sent, {found['completion_tokens']:,} answered{cost}"]
    for name, said in (("cut_off", "cut off at the bound of tokens"), ("without_token_counts", "without token counts")):
        if found[name]:
            lines.append(f"warning    {found[name]:,} answers {said}")
    if count := found["failed"]["count"]:
        first = found["failed"]["first"][0]
        lines.append(f"warning    {count:,} queries have no answer; {first['query_id']}: {first['reason']}")
    scores = found.get("scores", {})
    for name, score in scores.get("scores", {}).items():
        spread = "" if "value" in score else f"  [{score['low']:.3f}, {score['high']:.3f}]"
        lines.append(f"{name:<11}{score.get('mean', score.get('value')):.3f}{spread}  of {scores['scored']:,}")
    return "\n".join(lines)
