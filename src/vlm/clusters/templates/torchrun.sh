#!/bin/bash
# Written by @{command}
# Start it on each of the @{nodes} nodes: HEAD=<first node> bash @{file}
@{setup}
exec torchrun --nnodes @{nodes} --nproc-per-node @{gpus} \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the first node}:@{port}" --rdzv-id @{name} --max-restarts @{restarts} \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout @{notice} \
    -m vlm @{words}
