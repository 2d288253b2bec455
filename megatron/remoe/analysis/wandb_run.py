"""The W&B run of a run: a resumed run continues it, and the report becomes its artifact.

Megatron starts the W&B run. Its folder `wandb/` in `wandb_save_dir` knows the id of the last one.
"""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.remoe import checkpoint
from megatron.remoe.analysis.runs import Run


def last_id(save_dir: Path) -> str | None:
    """Return the id of the last W&B run whose files are in a folder, or None."""
    link = save_dir / "wandb/latest-run"
    if not link.is_symlink():
        return None
    found = re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+)", Path(os.readlink(link)).name)
    return found[1] if found else None


def continue_last(args: argparse.Namespace) -> None:
    """Let a run that goes on from its own checkpoint continue its last W&B run.

    Megatron calls `wandb.init` in this process later, which reads the environment. A
    `WANDB_RUN_ID` that the user has set stays.

    Args:
        args: Megatron's arguments, as they are parsed.
    """
    if not args.wandb_project or not args.wandb_save_dir:
        return
    goes_on = args.load and args.load == args.save and checkpoint.tracked(Path(args.load))
    run_id = last_id(Path(args.wandb_save_dir)) if goes_on else None
    if run_id is not None and "WANDB_RUN_ID" not in os.environ:
        os.environ["WANDB_RUN_ID"] = run_id
        os.environ.setdefault("WANDB_RESUME", "allow")


@dataclass(frozen=True)
class WandbRun:
    """Where W&B has a run.

    Attributes:
        id: The run's id.
        name: The name that people see.
        project, entity: Where the run is; an entity of None is the user's default.
        mode: "online", "offline", or None for what wandb takes by itself.
        save_dir: The folder with wandb's files.
    """

    id: str
    name: str | None
    project: str
    entity: str | None
    mode: Any
    save_dir: Path

    @classmethod
    def of(cls, run: Run) -> "WandbRun":
        """Return the W&B run of a run directory.

        Raises:
            ValueError: The run was trained without W&B, or its files are gone.
            ModuleNotFoundError: wandb is not installed.
        """
        import wandb  # noqa: F401, said before anything is written

        flags = run.config
        project, mode = flags.get("wandb_project"), flags.get("wandb_mode")
        if not project or mode == "disabled":
            raise ValueError(
                f"{run.path} was trained with wandb_project {project!r} and wandb_mode {mode!r}, "
                f"so that W&B has no run of it; leave --wandb out"
            )
        save_dir = Path(flags.get("wandb_save_dir") or run.path)
        run_id = last_id(save_dir)
        if run_id is None:
            raise ValueError(
                f"{save_dir / 'wandb'} has no files of a W&B run, which know its id; put them back "
                f"there, or leave --wandb out"
            )
        name, entity = flags.get("wandb_exp_name"), flags.get("wandb_entity") or None
        return cls(run_id, name, project, entity, mode, save_dir)

    def log_report(self, report: Path) -> str:
        """Log a file as the artifact `report-ID`; return a line that says where it is."""
        import wandb

        with wandb.init(
            id=self.id,
            project=self.project,
            entity=self.entity,
            name=self.name,
            mode=self.mode,
            # Offline there is nobody to ask for the run; its id is enough for `wandb sync`.
            resume=None if self.mode == "offline" else "allow",
            dir=self.save_dir,
            settings=wandb.Settings(silent=True),
        ) as run:
            artifact = wandb.Artifact(f"report-{self.id}", type="report")
            artifact.add_file(str(report), name="report.html")
            run.log_artifact(artifact)
            files = Path(run.dir).parent
        sync = f"; wandb sync --append {files} sends it" if self.mode == "offline" else ""
        return f"artifact report-{self.id} of the W&B run {self.id} in {self.project}{sync}"
