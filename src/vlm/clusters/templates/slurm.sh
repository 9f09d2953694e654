#!/bin/bash
# Written by @{command}
# Hand it in with: sbatch @{file}
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=1
@{resources}
# Ask for a checkpoint @{notice} seconds before the end; a preempted or failed node queues the job again.
#SBATCH --signal=USR1@@@{notice}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

@{setup}
cancelled=
trap cancelled=1 TERM  # scancel, and preemption, after which Slurm itself queues the job again

# One task a node, which starts a rank for each GPU. Nodes, node rank and rendezvous come from Slurm. When the ranks of
# one node have ended, those of the others have a minute to end.
srun --ntasks-per-node=1@{step} --wait=60 @{launch} --nproc @{gpus} -- @{words}
code=$?
# @{saved}: a checkpoint was saved on a signal, and the same command resumes from it.
if [ "$code" -eq @{saved} ] && [ -z "$cancelled" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
