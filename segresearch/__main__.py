"""`segresearch COMMAND ...`, and `python -m segresearch COMMAND ...`. A command is imported when it is called."""

import sys

COMMANDS = {
    "generate": "images of one or several guidance methods on the same seeds, and a grid of them",
    "evaluate": "guidance methods measured on the same images: tables, figures, a page",
    "analyze": "the energy landscape of a model's self-attention",
    "overview": "all runs of an experiment in one table; without a name, an index of all runs",
    "reproduce": "a PNG made again from the record in it, and compared",
    "models": "the models that can be named here: configs and the local hub cache",
    "fid": "the Fréchet distance of two folders of images",
    "kid": "the kernel distance of two folders of images",
    "prdc": "precision, recall, density and coverage of two folders of images",
    "clip": "the cosine of images and their prompts, by CLIP",
    "lpips": "the perceptual distance of the images of the same name in two folders",
    "is": "the inception score of a folder of images",
    "score": "what networks fitted to people's preferences say of images: aesthetic, PickScore, HPSv2, ImageReward",
    "dashboard": "a W&B workspace or report of an experiment",
    "train-mini": "the training of the embedded model",
}
MEASURES = ("fid", "kid", "prdc", "clip", "lpips", "is", "score")  # one module


def main() -> None:
    """Runs the command that the first argument names. Ctrl-C is one line from the first moment on."""
    try:
        _run()
    except KeyboardInterrupt:
        print("error: stopped; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None


def _run() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        from segresearch.cli import one_line_errors

        with one_line_errors():
            print("usage: segresearch COMMAND ...\n")
            print("\n".join(f"  {key:12}{text}" for key, text in COMMANDS.items()))
            print("\n`segresearch COMMAND --help` has its settings. A quick look: segresearch generate experiment=demo")
        return
    if name == "--version":
        from segresearch import __version__

        print(f"segresearch {__version__}")
        return
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f" (commands: {', '.join(COMMANDS)})"
        print(f"error: {name}: no such command{hint}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"segresearch {name}", *sys.argv[2:]]
    if name in MEASURES:
        from segresearch.measure import main as measure

        measure(name)
    else:
        from segresearch import commands

        getattr(commands, name.replace("-", "_"))()


if __name__ == "__main__":
    main()
