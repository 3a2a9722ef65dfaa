"""Several processes of one command: who they are, how they talk, and what happens when one ends. No torch on import.

torchrun, accelerate launch and the like start the same command N times and number the copies (RANK, WORLD_SIZE).
Process 0, the leader, runs the command and alone prints and writes its results; the others measure what it hands
out. They talk through the key-value store of torch.distributed, which needs no process group and no GPU:

    with together() as team:            # None: one process
        if team and not team.leader: ...
"""

from kascade_cli.processes.meeting import check_alone, team, together
from kascade_cli.processes.members import Ended, Over, Team
from kascade_cli.processes.place import Place, place

__all__ = ["Ended", "Over", "Place", "Team", "check_alone", "place", "team", "together"]
