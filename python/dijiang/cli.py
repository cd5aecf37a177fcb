"""`dijiang`: the command line.

Standard output carries results alone (with --json: one JSON object); progress and errors go to
standard error. Exit codes: 0 done, 1 failed, 2 wrong usage or unusable input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

try:
    import rich  # noqa: F401
    import typer
except ImportError:
    typer = None

if typer is None:

    def main() -> int:
        """Says what to install: the command line needs two packages that the library does not."""
        print(
            "error: the command line needs typer and rich: pip install 'dijiang[cli]'",
            file=sys.stderr,
        )
        return 2

else:
    from .console import Terminal, error_line, table

    app = typer.Typer(
        name="dijiang",
        help="Gives a pretrained language model attention of linear cost.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )

    class Preset(str, Enum):
        """Named configurations of DiJiangConfig."""

        default = "default"
        paper = "paper"
        published = "published"
        window = "window"

    Model = Annotated[
        str | None,
        typer.Option(
            help="Hub id, folder or GGUF file. Default: the bundled SmolLM2-135M.",
            show_default=False,
        ),
    ]
    Data = Annotated[
        str | None,
        typer.Option(
            help="Text file, folder of text files or `datasets` id. Default: Python's own help.",
            show_default=False,
        ),
    ]
    Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]
    PresetOption = Annotated[
        Preset,
        typer.Option(help="`paper`: its features alone; `window`: no far keys, nothing to train."),
    ]
    FeatureMap = Annotated[
        str | None, typer.Option(help="As DiJiangConfig.feature_map.", show_default=False)
    ]
    NumFeatures = Annotated[int | None, typer.Option(help="Features a head.", show_default=False)]
    Window = Annotated[int | None, typer.Option(help="Exact keys: block size.", show_default=False)]
    Sinks = Annotated[
        int | None, typer.Option(help="Exact keys: first tokens.", show_default=False)
    ]
    CacheSize = Annotated[
        int | None,
        typer.Option(help="Exact keys: chosen beyond the window, a kv head.", show_default=False),
    ]
    Spread = Annotated[
        bool,
        typer.Option(
            "--spread/--even", help="Hard keys where heads need them, or as many for each."
        ),
    ]
    Out = Annotated[Path, typer.Option(help="Folder to write to.")]

    def main() -> int:
        """The console script. Returns the exit code."""
        try:
            code = app(standalone_mode=False)
        except KeyboardInterrupt:
            error_line("interrupted")
            return 130
        except Exception as error:
            return _failed(error)
        return code if isinstance(code, int) else 0

    def _failed(error: Exception) -> int:
        """One line for a person; the exit code tells a wrong input from a failure."""
        if os.environ.get("DIJIANG_DEBUG"):
            import traceback

            traceback.print_exc()
        format_message = getattr(error, "format_message", None)  # click's own errors
        if callable(format_message):
            message = format_message() or type(error).__name__
            error_line(message if message.endswith(".") else f"{message}.")
            return 2
        message = str(error) or type(error).__name__
        if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError):
            error_line(message)
            return 2
        known = isinstance(error, OSError | ImportError | RuntimeError | NotImplementedError)
        error_line(message if known else f"{type(error).__name__}: {message}")
        return 1

    @app.command()
    def demo(
        model: Model = None,
        data: Data = None,
        out: Out = Path("demo-out"),
        minutes: Annotated[float, typer.Option(help="Time for all of it, set-up apart.")] = 13.0,
        fresh: Annotated[bool, typer.Option(help="Forget an earlier run's results.")] = False,
        as_json: Json = False,
    ):
        """Convert, distill and measure a model; write a report with plots.

        Example: `dijiang demo --minutes 13`, then open `demo-out/report.md`
        """
        from .demo import Settings, report, run

        if minutes <= 0:
            raise ValueError(f"--minutes must be positive, got {minutes:g}")
        settings = Settings(model=model, data=data, out=out, minutes=minutes)
        results = run(settings, reporter=_terminal(as_json), fresh=fresh)
        _print(results, as_json, report(results, []))
        if not as_json:
            typer.echo(f"\nReport: {out / 'report.md'}")

    @app.command()
    def convert(
        out: Out,
        model: Model = None,
        data: Data = None,
        preset: PresetOption = Preset.default,
        feature_map: FeatureMap = None,
        num_features: NumFeatures = None,
        window: Window = None,
        sinks: Sinks = None,
        cache_size: CacheSize = None,
        spread: Spread = True,
        calibrate: Annotated[bool, typer.Option(help="Set the far keys' weight on text.")] = True,
        as_json: Json = False,
    ):
        """Replace a model's softmax attention and save the result, untrained.

        Example: `dijiang convert --out converted --window 64`
        """
        config = _config(preset, feature_map, num_features, window, sinks, cache_size)
        console = _terminal(as_json)
        student, tokenizer = _load_plain(model, console)
        from .conversion import convert as convert_model

        spread = spread and config.cache_size > 0
        calibrate = calibrate and config.has_near and config.has_far
        if spread or calibrate:
            rows = _calibration_row(data, tokenizer, student, config)
        if spread:
            config = _spread(student, config, rows, console)
        with console.stage("converting"):
            # Hard keys are spread above, or are not to be.
            rows = rows if calibrate else None
            convert_model(student, config, calibration=rows, spread=False)
        _save(student, tokenizer, out)
        result = {"out": str(out), "start": student.dijiang_start, "config": config.to_dict()}
        _print(result, as_json, f"{out}: starts from {student.dijiang_start}")

    @app.command()
    def distill(
        out: Out,
        model: Model = None,
        data: Data = None,
        preset: PresetOption = Preset.default,
        feature_map: FeatureMap = None,
        num_features: NumFeatures = None,
        window: Window = None,
        sinks: Sinks = None,
        cache_size: CacheSize = None,
        spread: Spread = True,
        tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 65536,
        transfer_tokens: Annotated[
            int | None,
            typer.Option(
                help="Of these, attention transfer's; the rest trains prediction.",
                show_default="none with a window or sinks, a quarter without",
            ),
        ] = None,
        train: Annotated[
            str, typer.Option(help="What prediction trains: dijiang, attention or all.")
        ] = "attention",
        length: Annotated[int, typer.Option(help="Tokens of one training sequence.")] = 1024,
        repeats: Annotated[
            bool,
            typer.Option(
                "--repeats",
                help="Let rows repeat passages of their first half: recall at some cost in prose.",
            ),
        ] = False,
        as_json: Json = False,
    ):
        """Convert a model (unless it is) and train it to attend as its softmax did; save it.

        Example: `dijiang distill --data notes/ --tokens 65536 --out student`
        """
        config = _config(preset, feature_map, num_features, window, sinks, cache_size)
        console = _terminal(as_json)
        student, tokenizer = _load(model, console)
        from .conversion import convert as convert_model
        from .conversion import is_converted
        from .distillation import distill as distill_model

        if tokens < 1:
            raise ValueError(f"--tokens must be at least 1, got {tokens}")
        blocks = _train_blocks(data, tokenizer, length)
        if not is_converted(student):
            if spread and config.cache_size:
                config = _spread(student, config, blocks[: -(-4096 // length)], console)
            convert_model(student, config)
        if repeats:
            from .data import with_repeats

            blocks = with_repeats(blocks)
        with console.stage(f"distilling on {tokens} tokens") as progress:
            done = distill_model(
                student,
                blocks,
                tokens=tokens,
                transfer_tokens=transfer_tokens,
                train=train,
                progress=lambda row: progress(row["step"], row["steps"]),
            )
        _save(student, tokenizer, out)
        result = {
            "out": str(out),
            "start": done.start,
            "tokens": done.tokens,
            "seconds": done.seconds,
            "training": done.history,
        }
        losses = [row["loss"] for row in done.history]
        said = f"loss {losses[0]:.4g} -> {losses[-1]:.4g}" if losses else "nothing to train"
        _print(result, as_json, f"{out}: {said}, {done.tokens} tokens in {done.seconds:.0f} s")

    @app.command(name="eval")
    def evaluate(
        model: Model = None,
        teacher: Annotated[
            str | None,
            typer.Option(help="A second model to measure beside the first.", show_default=False),
        ] = None,
        baseline: Annotated[
            bool,
            typer.Option("--baseline", help="Measure the teacher's training-free window, too."),
        ] = False,
        data: Data = None,
        measure: Annotated[
            str,
            typer.Option(
                help="By comma: perplexity, recall (a pass key), positions (perplexity by tokens "
                "seen), curves (recall, 1 to 16 windows back), agreement (KL, likeliest token), "
                "attention (each layer's error), maps; or all that the models allow."
            ),
        ] = "perplexity,recall",
        lengths: Annotated[str, typer.Option(help="Window lengths, by comma.")] = "512,2048",
        tokens: Annotated[int, typer.Option(help="Tokens for each length.")] = 8192,
        distances: Annotated[
            str, typer.Option(help="Pass-key distances, by comma; empty: none.")
        ] = "200,400",
        trials: Annotated[int, typer.Option(help="Questions for each distance.")] = 10,
        position_length: Annotated[
            int, typer.Option(help="Window of positions, agreement and attention.")
        ] = 2048,
        tasks: Annotated[
            str, typer.Option(help="Of the recall curves: pass-key, associative, copy.")
        ] = "pass-key,associative,copy",
        reach: Annotated[
            str | None,
            typer.Option(
                help="Their distances, by comma.",
                show_default="1 to 16 times the model's window",
            ),
        ] = None,
        heads: Annotated[
            str | None,
            typer.Option(
                help="Of the maps, as layer:head by comma.",
                show_default="the first of three layers",
            ),
        ] = None,
        harness: Annotated[
            str | None,
            typer.Option(
                "--lm-eval",
                help="Tasks of lm-evaluation-harness, by comma; it gets their data itself.",
                show_default=False,
            ),
        ] = None,
        limit: Annotated[
            int | None, typer.Option(help="Documents of each such task.", show_default=False)
        ] = None,
        plots: Annotated[
            Path | None, typer.Option(help="Folder to draw in.", show_default=False)
        ] = None,
        as_json: Json = False,
    ):
        """Measure a model: perplexity on held-out text, recall, closeness to its teacher.

        Example: `dijiang eval --model demo-out/model --lengths 512,2048`

        Everything: `dijiang eval --model student --teacher base --baseline --measure all
        --plots plots`
        """
        from . import data as text
        from .evaluate import report, suite

        chosen = _measures(measure, plots is not None, bool(harness))
        settings = suite.Settings(
            measures=chosen,
            lengths=tuple(_numbers(lengths, "--lengths", least=2)),
            tokens=tokens,
            distances=tuple(
                _numbers(distances, "--distances", least=1) if distances.strip() else ()
            ),
            trials=trials,
            position_length=position_length,
            tasks=tuple(_words(tasks)),
            reach=None if reach is None else tuple(_numbers(reach, "--reach", least=1)),
            heads=None if heads is None else _heads(heads),
            harness=tuple(_words(harness or "")),
            limit=limit,
            lenient="all" in _words(measure),
        )
        if trials < 1 or tokens < 1:
            raise ValueError(f"--trials and --tokens must be positive, got {trials} and {tokens}")
        if position_length < 2:
            raise ValueError(f"--position-length must be at least 2, got {position_length}")
        if "maps" in chosen and plots is None:
            raise ValueError("--measure maps draws pictures: say where, by --plots FOLDER")
        if baseline and teacher is None:
            raise ValueError("--baseline is made of the teacher: give --teacher, not converted")
        console = _terminal(as_json)
        corpus = text.load_text(data)
        done = suite.run(
            (model or "default model", lambda: _load(model, console)),
            corpus,
            settings,
            teacher=None if teacher is None else (teacher, lambda: _load(teacher, console)),
            baseline=baseline,
            reporter=console,
        )
        written = _draw(done, plots) if plots is not None else []
        said = report.text(done.results)
        if written:
            done.results["plots"] = [str(path) for path in written]
            said = "\n".join([said, "", *map(str, written)]).strip()
        _print(done.results, as_json, said)

    @app.command()
    def generate(
        prompt: Annotated[str, typer.Argument(help="Text to continue.")],
        model: Model = None,
        max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
        temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
        seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
        state: Annotated[
            Path | None,
            typer.Option(help="What stands before the prompt: a file of `dijiang read`."),
        ] = None,
        as_json: Json = False,
    ):
        """Continue a prompt.

        Example: `dijiang generate --model demo-out/model "The list type in Python is"`
        """
        import torch

        from . import evaluate as measure

        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                "--max-new-tokens must be at least 1 and --temperature at least 0, got "
                f"{max_new_tokens} and {temperature:g}"
            )
        console = _terminal(as_json)
        net, tokenizer = _load(model, console)
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature} if temperature else {}
        if state is not None:
            from .states import load_state

            options["cache"] = load_state(state, net)
        made = measure.generate(net, tokenizer, prompt, max_new_tokens=max_new_tokens, **options)
        _print(dataclasses.asdict(made), as_json, prompt + made.text)

    @app.command()
    def read(
        text: Annotated[Path, typer.Argument(help="Text file.")],
        out: Annotated[Path, typer.Option(help="State file to write.")],
        model: Model = None,
        as_json: Json = False,
    ):
        """Let a converted model read a text and keep its state in a file of constant size.

        Example: `dijiang read book.txt --model student --out book.safetensors`, and then
        `dijiang generate --model student --state book.safetensors "In short,"`
        """
        from .states import prefill, save_state

        console = _terminal(as_json)
        net, tokenizer = _load(model, console)
        words = text.read_text()
        ids = tokenizer(words, return_tensors="pt", verbose=False)["input_ids"]
        with console.stage(f"reading {text}") as progress:
            cache = prefill(net, ids, progress=progress)
        path = save_state(cache, out, net)
        size = path.stat().st_size
        result = {"out": str(path), "tokens": ids.numel(), "bytes": size}
        _print(result, as_json, f"{path}: {ids.numel()} tokens in {size / 2**20:.1f} MiB")

    @app.command()
    def bench(
        model: Model = None,
        contexts: Annotated[str, typer.Option(help="By comma.")] = "512,1024,2048,4096,8192",
        steps: Annotated[int, typer.Option(help="Tokens decoded at each context.")] = 16,
        as_json: Json = False,
    ):
        """Decoding speed and cache size as the context grows, softmax beside converted.

        A model that is not converted yet is measured beside its converted copy.

        Example: `dijiang bench --contexts 512,8192 --json > bench.json; dijiang plot bench.json`
        """
        import copy

        from . import data as text
        from . import evaluate as measure
        from .conversion import convert as convert_model
        from .conversion import is_converted

        sizes = _numbers(contexts, "--contexts", least=1)
        if steps < 1:
            raise ValueError(f"--steps must be at least 1, got {steps}")
        console = _terminal(as_json)
        net, tokenizer = _load(model, console)
        models = {"converted": net}
        if not is_converted(net):
            models = {"softmax": net, "converted": convert_model(copy.deepcopy(net))}
        prose = text.tokenize(text.load_text().held_out, tokenizer)
        with console.stage("decoding") as progress:
            points = measure.decode_speed(models, prose, sizes, steps=steps, progress=progress)
        result = {
            "decode": {name: [dataclasses.asdict(p) for p in rows] for name, rows in points.items()}
        }
        _print(result, as_json, _decode_table(result["decode"]))

    @app.command()
    def plot(
        results: Annotated[Path, typer.Argument(help="JSON of demo, eval, bench or distill.")],
        out: Out = Path("plots"),
        as_json: Json = False,
    ):
        """Draw plots from a results file.

        Example: `dijiang plot demo-out/results.json --out plots`
        """
        from . import plots

        try:
            content = json.loads(results.read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"{results}: no such file") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{results}: not a results file: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{results}: not a results file: no JSON object in it")
        try:
            written = plots.draw(content, out)
        except (KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{results}: not a results file: {error!r} is missing") from error
        _print({"files": [str(path) for path in written]}, as_json, "\n".join(map(str, written)))

    @app.command()
    def info(as_json: Json = False):
        """Versions, what was built, and what this machine can use.

        Example: `dijiang info --json`
        """
        facts = _facts()
        width = max(map(len, facts))
        lines = [f"{name.replace('_', ' '):{width}}  {value}" for name, value in facts.items()]
        _print(facts, as_json, "\n".join(lines))

    def _facts() -> dict[str, Any]:
        import importlib.metadata
        import importlib.util
        import platform

        import torch

        from . import __version__, _library

        facts: dict[str, Any] = {
            "dijiang": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        for name in ("transformers", "matplotlib", "datasets"):
            found = importlib.util.find_spec(name)
            facts[name] = importlib.metadata.version(name) if found else "not installed"
        try:
            _library.load()
            facts["cpu_kernels"] = "built"
        except ImportError as error:
            facts["cpu_kernels"] = f"not usable: {error}"
        try:
            built = importlib.import_module("dijiang._core").build_info()
        except ImportError as error:
            built = {}
            facts["core"] = f"not built: {error}"
        if built:
            facts["compiler"] = built["compiler"]
            levels = {4: "AVX-512", 3: "AVX2"}
            facts["cpu_instructions"] = levels.get(built["cpu_level"], "portable")
        why_no_cuda = _library.why_no_cuda()
        facts["cuda_kernels"] = f"not usable: {why_no_cuda}" if why_no_cuda else "built"
        if built.get("cuda"):
            facts["cuda_compiler"] = built["cuda"]
            facts["cuda_architectures"] = ", ".join(built["cuda_architectures"])
        cuda = torch.cuda.is_available()
        facts["cuda_device"] = torch.cuda.get_device_name() if cuda else "none usable"
        usable = ["cpu"] * (facts["cpu_kernels"] == "built") + ["cuda"] * (cuda and not why_no_cuda)
        facts["usable"] = ", ".join(usable) or "nothing"
        return facts

    # ---- what the commands share ----------------------------------------------------------------

    def _terminal(as_json: bool) -> Terminal:
        """Progress for a person or a log; transformers' own bars and notes are left out."""
        import warnings

        warnings.filterwarnings("ignore", category=FutureWarning)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            from transformers.utils import logging
        except ImportError as error:
            raise ImportError("models need transformers: pip install 'dijiang[hf]'") from error
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return Terminal(quiet=as_json and not sys.stderr.isatty())

    def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
        typer.echo(json.dumps(result, indent=1) if as_json else text)

    def _numbers(text: str, option: str, *, least: int) -> list[int]:
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            raise ValueError(f"{option} takes whole numbers by comma, got {text!r}") from None
        if min(numbers) < least:
            raise ValueError(f"{option} must be at least {least} each, got {text!r}")
        return numbers

    def _words(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    def _measures(text: str, drawing: bool, harness: bool) -> tuple[str, ...]:
        """The measurements named; lm-evaluation-harness is asked for by its own option."""
        from .evaluate.suite import MEASURES

        known = [name for name in MEASURES if name != "harness"]
        chosen = _words(text)
        for name in chosen:
            if name not in (*known, "all"):
                raise ValueError(f"--measure must be among {', '.join(known)}, all; got {name!r}")
        if "all" in chosen:
            chosen = [name for name in known if name != "maps" or drawing]
        if harness:
            chosen.append("harness")
        if not chosen:
            raise ValueError("--measure names nothing to measure")
        return tuple(chosen)

    def _heads(text: str) -> tuple[tuple[int, int], ...]:
        try:
            pairs = [tuple(map(int, part.split(":"))) for part in _words(text)]
            return tuple((layer, head) for layer, head in pairs)
        except ValueError:
            raise ValueError(f"--heads takes layer:head by comma, got {text!r}") from None

    def _draw(done, folder: Path) -> list[Path]:
        from . import plots

        folder.mkdir(parents=True, exist_ok=True)
        written = plots.draw(done.results, folder) if plots.can_draw(done.results) else []
        if done.maps:
            written.append(plots.attention_maps(done.maps, folder / "maps.png"))
        return written

    def _config(preset, feature_map, num_features, window, sinks, cache_size):
        from .config import DiJiangConfig

        given = {
            "feature_map": feature_map,
            "num_features": num_features,
            "window": window,
            "sinks": sinks,
            "cache_size": cache_size,
        }
        given = {name: value for name, value in given.items() if value is not None}
        make = {
            Preset.default: DiJiangConfig,
            Preset.paper: DiJiangConfig.paper,
            Preset.published: DiJiangConfig.published,
            Preset.window: DiJiangConfig.window_only,
        }[preset]
        return make(**given)

    def _spread(model, config, rows, console: Terminal):
        """The config with its hard keys where the model needs them."""
        from .allocation import spread_hard_keys

        with console.stage("finding where hard keys are needed") as progress:
            return spread_hard_keys(model, rows, config, progress=progress)

    def _load(spec: str | None, console: Terminal):
        """(model, tokenizer), converted or not."""
        from transformers import AutoTokenizer

        from . import hub

        with console.stage(f"loading {spec or 'the default model'}"):
            if spec is not None and _is_converted_folder(Path(spec)):
                return hub.from_pretrained(spec), AutoTokenizer.from_pretrained(spec)
            try:
                return hub.load_base(spec)
            except (OSError, ValueError) as error:
                if spec is None or isinstance(error, FileNotFoundError):
                    raise
                raise ValueError(
                    f"{spec}: no model folder, GGUF file or hub id that can be loaded: {error}"
                ) from error

    def _is_converted_folder(folder: Path) -> bool:
        try:
            return "dijiang" in json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            return False

    def _load_plain(spec: str | None, console: Terminal):
        model, tokenizer = _load(spec, console)
        from .conversion import is_converted

        if is_converted(model):
            raise ValueError(f"{spec}: converted already")
        return model, tokenizer

    def _train_blocks(source: str | None, tokenizer, length: int):
        from . import data as text

        corpus = text.load_text(source)
        name = f"{corpus.name}, training part"
        return text.pack(corpus.train, tokenizer, length, name=name)

    def _calibration_row(source: str | None, tokenizer, model, config):
        """Up to 4096 tokens, as text and model allow: far keys open for such contexts."""
        from . import data as text

        corpus = text.load_text(source)
        tokens = text.tokenize(corpus.train, tokenizer)
        longest = getattr(model.config, "max_position_embeddings", None) or 4096
        length = max(4 * max(config.window, config.sinks), min(4096, longest, len(tokens)))
        return text.cut(tokens, length, blocks=1, name=f"{corpus.name}, training part")

    def _save(model, tokenizer, out: Path) -> None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

    def _decode_table(decode: dict[str, Any]) -> str:
        header = ["context"]
        for name in decode:
            header += [f"{name} tokens/s", f"{name} cache MiB"]
        rows = []
        for points in zip(*decode.values(), strict=True):
            row = [str(points[0]["context"])]
            for point in points:
                row += [f"{point['tokens_per_second']:.1f}", f"{point['cache_bytes'] / 2**20:.1f}"]
            rows.append(row)
        return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
