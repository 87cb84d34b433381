"""Sample videos from a distilled student, or from the teacher with guidance.

A video depends on (prompt, seed) alone: run it again, or on several GPUs with torchrun, and complete files stay as
they are, partial ones are made again.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codmd.cli import CommandError, above, at_least, integer_in, nearest
from codmd.extras import needing
from codmd.files import is_training

if TYPE_CHECKING:
    import torch

    from codmd.distill.data.prompts import Embeddings
    from codmd.distill.data.textures import Textures
    from codmd.distill.run.parallel import Processes
    from codmd.distill.update.rollout import Transition
    from codmd.models.base import Condition

    from .folder import SampleFolder, Share
    from .names import PromptJob
    from .samplers import FewStep, Guided
    from .source import Source

HELP = "sample videos from a distilled student, or from the teacher with guidance"
NO_PROMPTS = "--prompts: not given; expected a text file, a folder of codmd encode, or --vbench"
TEACHER_ONLY = ("steps", "guidance", "guidance_form", "shift", "solver")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd sample`."""
    parser.add_argument(
        "source",
        type=Path,
        help="a run or checkpoint of codmd train, a diffusers folder or repository, or a weight file",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the videos")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a text file with one prompt a line, a table of prompts and images, or a folder that codmd encode wrote "
        "(the captions of the run's data, if they are its own)",
    )
    parser.add_argument("--image", type=Path, help="that every video starts from")
    parser.add_argument("--vbench", type=Path, metavar="FULL_INFO", help="VBench's prompts, file names and numbers")
    parser.add_argument("--seeds", type=integer_in(1, 10_000), help="videos of every prompt (1)")
    parser.add_argument("--seed", type=integer_in(0, 2**31), help="seed of the first of them (0)")
    parser.add_argument("--ema", action="store_true", help="the running average of the trained student")
    parser.add_argument("--latents", action="store_true", help="keep latents and skip the VAE")

    student = parser.add_argument_group("student")
    student.add_argument("--sigmas", type=_levels, help="noise levels from 1 downwards (those of its training)")

    student.add_argument(
        "--transition",
        choices=("renoise", "euler"),
        help="to the next level: new noise, or an Euler step (that of its training, or renoise)",
    )

    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", action="store_true", help="many steps with guidance instead of the few")
    teacher.add_argument("--steps", type=integer_in(1, 1000), help="solver steps (50)")
    teacher.add_argument("--guidance", type=at_least(0), help="guidance scale s (5)")
    teacher.add_argument("--guidance-form", choices=("uncond", "cond"), help="u + s (c - u), or c + s (c - u) (uncond)")
    teacher.add_argument("--shift", type=above(0), help="of the noise levels; 3 for 480p, 5 for 720p (3)")
    teacher.add_argument("--solver", choices=("unipc", "euler"), help="of diffusers (unipc)")

    model = parser.add_argument_group("model")
    model.add_argument("--model", help="that the weights are of, unless codmd train wrote them (wan)")
    model.add_argument("--config", help="of a weight file: 1.3b, 14b, i2v_14b, ... or a config.json (found out)")
    model.add_argument(
        "--text-encoder", help="folder or repository of text_encoder and tokenizer (SOURCE, if it has them)"
    )
    model.add_argument("--vae", help="folder or repository of the VAE, or of a pipeline (SOURCE, if it has one)")
    model.add_argument(
        "--image-encoder", help="folder or repository of image_encoder and image_processor (SOURCE, if it has them)"
    )
    model.add_argument("--negative-prompt", help="of the teacher's guidance (Wan's own)")
    model.add_argument("--frames", type=integer_in(1, 10_000), help="of a video (81, or as trained)")
    model.add_argument("--height", type=integer_in(16, 10_000), help="in pixels (480, or as trained)")
    model.add_argument("--width", type=integer_in(16, 10_000), help="in pixels (832, or as trained)")
    model.add_argument("--attention", help="backend by diffusers' name (native)")
    model.add_argument("--compute", choices=("bfloat16", "float32"), help="dtype of the network (bfloat16)")
    model.add_argument("--compile", action="store_true", default=None, help="compile the repeated block")
    model.add_argument("--context", type=integer_in(1, 1024), default=1, help="processes that share every video (1)")
    model.add_argument("--device", help="cpu, cuda, ... (a GPU of its own for every process, where there is one)")


def _levels(text: str) -> tuple[float, ...]:
    from codmd.distill.update.schedule import check_step_list

    try:
        return check_step_list([float(level) for level in text.split(",")])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; {error}") from error


def run(args: argparse.Namespace) -> int:
    """Samples what is missing; returns the exit status.

    Raises:
        CommandError: an option, a prompt, the weights or the folder cannot be used.
    """
    try:
        _check_options(args)
        with needing("train"):
            import diffusers  # noqa: F401
            import imageio  # noqa: F401
            import imageio_ffmpeg  # noqa: F401
            import torch
            import transformers  # noqa: F401
    except ValueError as error:
        raise CommandError(str(error)) from error
    from codmd.distill.config.sections import ParallelSettings
    from codmd.distill.run.parallel import processes

    try:
        if args.context == 1:
            return _run(args, None)
        with processes(ParallelSettings(context=args.context)) as team:
            return _run(args, team)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise CommandError(f"{error}; complete videos stay; try --latents, or a smaller video") from error


def _check_options(args: argparse.Namespace) -> None:
    if not (args.prompts or args.vbench or is_training(args.source)):
        raise ValueError(NO_PROMPTS)
    for name in TEACHER_ONLY:
        if getattr(args, name) is not None and not args.teacher:
            raise ValueError(f"--{name.replace('_', '-')}: only with --teacher; the student takes no guidance")
    for name in ("sigmas", "transition"):
        if getattr(args, name) and args.teacher:
            raise ValueError(f"--{name}: of the student; the teacher takes --steps and --shift")
    if args.image and (args.vbench or (args.prompts and args.prompts.is_dir())):
        raise ValueError("--image: for prompts as text; encode prompts with their images instead (codmd encode)")
    if args.image and not args.image.is_file():
        raise ValueError(f"--image: {args.image}: no such file")
    if args.vbench and (args.seeds is not None or args.seed is not None):
        raise ValueError("--seeds, --seed: VBench fixes them; leave them out with --vbench")


def _run(args: argparse.Namespace, team: Processes | None) -> int:
    from codmd import models
    from codmd.distill.data.prompts import Embeddings
    from codmd.models.fingerprint import fingerprint

    from .folder import SampleFolder, Share
    from .source import open_source

    embeddings = Embeddings(args.prompts) if args.prompts and args.prompts.is_dir() else None
    share, name = Share.from_environment(args.context), args.model or models.DEFAULT
    trained = is_training(args.source)
    plain = not (args.teacher or trained)
    known = models.adapter(name).student_sigmas(args.source) if plain and not args.sigmas else ()
    if not (args.teacher or args.sigmas or trained or known):
        raise ValueError(
            f"--sigmas: not given, and plain weights do not tell them; {models.adapter(name).student_steps} "
            "(or ask for the --teacher's steps)"
        )
    video = {side: getattr(args, side) for side in ("frames", "height", "width")}
    prompts, images = _prompts(args, embeddings)
    options = _model_options(args, embeddings, name) | ({"from_image": True} if images else {})
    source = open_source(args.source, args.ema, options, _device(args.device, share), video, name)
    if team is not None and team.context is not None:
        source.model.split_tokens(team.context)
    if source.model.from_image and not images:
        raise ValueError("--image: not given; this model starts every video from an image")
    encoded = embeddings or source.data
    jobs = _jobs(args, prompts, source.data, images)
    transition = models.adapter(name).student_transition(args.source) if known else source.transition
    sampler = _sampler(args, args.sigmas or source.sigmas or known, args.transition or transition)
    folder = SampleFolder(args.out, args.latents)
    size = dict(zip(("frames", "channels", "height", "width"), source.model.latent_shape, strict=True))
    content = source.options.content(prompts=encoded is None, guided=args.teacher, pixels=not args.latents)
    settings = {
        "weights": fingerprint(source.model.state_dict()),
        "sampler": type(sampler).__name__,
        **vars(sampler),
        "latent_size": size,
        **source.options.record(guided=args.teacher),
        **{name: digest for name, (_, digest) in content.items()},
        "prompts": {job.name: job.prompt for job in jobs},
        "embeddings": _fingerprints(embeddings, jobs),
        "images": {} if embeddings else _digests(jobs),
    }
    folder.check(settings)
    made, kept = _fill(folder, settings, share, jobs, source, sampler, encoded, team)
    if share.writes:
        of = f" (process {share.rank} of {share.world})" if share.world > 1 else ""
        print(f"{folder.kind}: {made} sampled, {kept} complete before{of}")
    return 0


def _prompts(args: argparse.Namespace, embeddings: Embeddings | None) -> tuple[Sequence[str] | None, Sequence[str]]:
    """The prompts that --prompts names, None without it, and the image of each, where there are any."""
    from codmd.distill.data.prompt_files import read_pairs

    if embeddings is not None:
        return embeddings.prompts, embeddings.images
    if not args.prompts:
        return None, []
    prompts, paths = read_pairs(args.prompts)
    if args.image and paths:
        raise ValueError(f"--image: {args.prompts} names an image for every prompt; expected one of the two")
    return prompts, [str(args.image)] * len(prompts) if args.image else [str(path) for path in paths]


def _jobs(
    args: argparse.Namespace, prompts: Sequence[str] | None, data: Textures | None, images: Sequence[str] = ()
) -> list[PromptJob]:
    """The videos wanted; without prompts those of the run's own captions, which are all that its data knows."""
    from .names import jobs_of, vbench_jobs

    wanted = data.prompts if prompts is None and data is not None else prompts
    first = args.seed or 0
    if args.vbench and images:
        raise ValueError("--vbench: its videos start from no image; expected prompts alone")
    if args.vbench:
        jobs = vbench_jobs(args.vbench, prompts)
    elif wanted is not None:
        jobs = jobs_of(wanted, range(first, first + (args.seeds or 1)), images)
    else:
        raise ValueError(NO_PROMPTS)
    captions = None if data is None else data.prompts
    if captions is not None:
        for prompt in (job.prompt for job in jobs if job.prompt not in captions):
            raise ValueError(f"--prompts: {prompt!r} is no caption of the run's data{nearest(prompt, captions)}")
    return jobs


def _model_options(args: argparse.Namespace, embeddings: Embeddings | None, name: str) -> dict[str, Any]:
    from codmd import models

    given = {
        "config": args.config,
        "text_encoder": args.text_encoder,
        "vae": args.vae,
        "image_encoder": args.image_encoder,
        "negative_prompt": args.negative_prompt,
        "attention": args.attention,
        "compute": args.compute,
        "compile": args.compile,
    }
    options = {option: value for option, value in given.items() if value is not None}
    options = models.adapter(name).pipeline_options(args.source) | options
    if args.teacher and embeddings is not None and args.negative_prompt is None:
        options["null_embedding"] = str(args.prompts)
    elif args.negative_prompt is not None:
        options["null_embedding"] = ""
    return options


def _device(name: str | None, share: Any) -> torch.device:
    import torch

    try:
        if name is not None:
            return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} cannot be used: {error}") from error
    if torch.cuda.is_available():
        torch.cuda.set_device(share.local_rank)
        return torch.device("cuda", share.local_rank)
    return torch.device("cpu")


def _sampler(args: argparse.Namespace, sigmas: tuple[float, ...], transition: Transition) -> FewStep | Guided:
    from .samplers import FewStep, Guided

    if args.teacher:
        given = {"form" if name == "guidance_form" else name: getattr(args, name) for name in TEACHER_ONLY}
        return Guided(**{name: value for name, value in given.items() if value is not None})
    return FewStep(sigmas, transition)


def _fill(
    folder: SampleFolder,
    settings: dict[str, Any],
    share: Share,
    wanted: Sequence[PromptJob],
    source: Source,
    sampler: FewStep | Guided,
    encoded: Embeddings | Textures | None,
    team: Processes | None,
) -> tuple[int, int]:
    """Samples what this process's share of the wanted videos lacks; the numbers of those made and found complete."""
    from tqdm import tqdm

    from codmd.models.base import move_cond

    frames = None if folder.latents else source.video_frames
    jobs = share.of(wanted)
    missing = {job: folder.missing(job, frames, source.model.latent_shape) for job in jobs}
    if team is not None:  # files appear while the others look
        missing = team.share_in_context(missing)
    made = sum(map(len, missing.values()))
    if made and share.writes and not folder.latents:
        source.load_decoder()
    conditions = _conditions([job for job in jobs if missing[job]], source, sampler, encoded)
    folder.create(settings)
    quiet = share.rank > 0 or not share.writes
    with tqdm(total=made * sampler.evaluations, unit="step", desc="sampling", disable=quiet) as bar:
        for job, seeds in missing.items():
            bar.set_postfix_str(job.prompt[:30])
            cond = move_cond(conditions[job], source.model.device) if seeds else None
            folder.sample(job, seeds, source, sampler, cond, bar.update, share.writes)
    return made, sum(len(job.seeds) for job in jobs) - made


def _fingerprints(embeddings: Embeddings | None, jobs: Sequence[PromptJob]) -> dict[str, str]:
    """File name to fingerprint of the embedding of its prompt and image; empty for prompts as text."""
    if embeddings is None:
        return {}
    found = [digest for _, digest in embeddings.fingerprints()]
    numbers = _numbers(embeddings.prompts, embeddings.images)
    return {job.name: found[numbers[job.prompt, job.image]] for job in jobs if (job.prompt, job.image) in numbers}


def _digests(jobs: Sequence[PromptJob]) -> dict[str, str]:
    """File name to CRC-32 of its image file."""
    return {job.name: f"{zlib.crc32(Path(job.image).read_bytes()):08x}" for job in jobs if job.image}


def _numbers(prompts: Sequence[str], images: Sequence[str]) -> dict[tuple[str, str], int]:
    """(prompt, image) to the first item that has them."""
    pairs = zip(prompts, images or [""] * len(prompts), strict=True)
    return {pair: number for number, pair in reversed(list(enumerate(pairs)))}


def _conditions(
    jobs: Sequence[PromptJob], source: Source, sampler: FewStep | Guided, encoded: Embeddings | Textures | None
) -> dict[PromptJob, Condition]:
    """Every prompt's condition on the CPU, encoded by itself; then the encoders' memory is given back."""
    from codmd.models.base import move_cond

    if encoded is not None:
        numbers = _numbers(encoded.prompts, encoded.images)
        return {job: encoded.condition([numbers[job.prompt, job.image]]) for job in jobs}
    model = source.model
    conditions = {
        job: move_cond(model.encode([job.prompt], [Path(job.image)] if job.image else []), "cpu") for job in jobs
    }
    if jobs and hasattr(sampler, "guidance"):
        model.null_cond(1)
    model.free_encoders()
    return conditions
