"""`stagemix study add-arm`: another arm, without touching what ran."""

from __future__ import annotations

import argparse

from megatron.commands.study_action import Action, seeds_argument
from megatron.commands.tables import console_for_tables
from megatron.config.errors import EXIT_DONE
from megatron.config.quantities import format_count
from megatron.study.added_arm import AddedArm, NewArm, with_arm, write_arm
from megatron.study.graph import Node
from megatron.study.node_state import trained_checkpoint

EPILOG = """\
examples:
  stagemix study add-arm STUDY cooled-code --from text/on --stage cooldown-code
  stagemix study add-arm STUDY low-decay --stage init --stage on --set optimizer.weight_decay=0.03
  stagemix study add-arm STUDY long --from text --stage '{ use = "on", name = "on-2", tokens = "100B" }'
  stagemix study add-arm STUDY trial --from text/init --stage code --dry-run

The study's file keeps its text, byte for byte, and gets a table [arms.NAME] at its end, once the study with it has been
planned without a fault. Shown is what the arm has in common with others, and what is trained for it alone. Nothing that
ran is touched: `stagemix study run STUDY --arm NAME` then trains what is new.

exit codes: 0 added (or shown, --dry-run) · 2 the name is there, the arm cannot be carried out, or other arms would
become others by it · 3 data that is there is broken · 74 the file cannot be written
"""


def _arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("name", metavar="NAME", help="what the arm is called")
    one.add_argument(
        "--stage",
        action="append",
        required=True,
        metavar="STAGE",
        help="a stage of [stages.…], or a TOML table of its own; may be given again, in order",
    )
    one.add_argument("--from", dest="parent", metavar="ARM/STAGE", help="branch from the end of this stage of this arm")
    one.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="another value; may be given again"
    )
    one.add_argument("--experiment", default="", metavar="WORDS", help="words that plans group arms by")
    one.add_argument("--dry-run", action="store_true", help="show it, and write nothing")
    seeds_argument(one)


def _run(args: argparse.Namespace) -> int:
    arm = NewArm(args.name, args.stage, args.parent, args.sets, args.experiment)
    added = with_arm(args.study, arm, args.seeds)
    if not args.dry_run:
        write_arm(added)
    _show(added, args.name, args.dry_run, args.seeds)
    return EXIT_DONE


def _show(added: AddedArm, name: str, dry: bool, seeds: list[int]) -> None:
    console = console_for_tables()
    console.print(added.text.strip() + "\n", soft_wrap=True)
    nodes = added.after.graph.nodes
    for word, ids in (("shared", added.shared), ("new", added.new)):
        for node in (nodes[one] for one in ids):
            there = "trained" if trained_checkpoint(added.after, node.id) else "to train"
            console.print(
                f"{word:<7}{node.label} {node.id[:8]}{_seed(added, node)}: {_size(node)}, {there}", soft_wrap=True
            )
    anew = sum(nodes[one].tokens for one in added.new)
    alone = sum(arm.naive for arm in added.after.graph.arms if arm.name == name)
    ratio = f" = {anew / alone:.3f}" if alone else ""
    console.print(f"{format_count(anew)} new tokens of {format_count(alone)} that it has alone{ratio}", soft_wrap=True)
    if not added.new:
        console.print("it is the same as what is there: nothing is trained for it", soft_wrap=True)
    more = f" --seeds {','.join(map(str, seeds))}" if seeds else ""
    if dry:
        console.print("nothing was written (--dry-run)")
    else:
        console.print(f"added to {added.path}: stagemix study run {added.path} --arm {name}{more}", soft_wrap=True)


def _seed(added: AddedArm, node: Node) -> str:
    seeds = {arm.seed for arm in added.after.graph.arms}
    return f" seed {node.seed}" if len(seeds) > 1 else ""


def _size(node: Node) -> str:
    return f"{format_count(node.tokens)} tokens" if node.kind == "train" else "average"


ACTION = Action(
    "Adds an arm to the study's file; shows what it shares, and what is new.", EPILOG, _arguments, _run, False
)
