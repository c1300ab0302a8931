# shellcheck shell=bash
# What job scripts share that are stopped and go on. Sourced before work starts; then
#   WORK & watch_over FOLDER STATUS
# waits for it, asks it to stop where time runs out or another job takes the nodes, queues the job again if
# FOLDER/STATUS then says that this life of the job was preempted, and ends the script with WORK's exit code.

life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}

# This shell alone gets USR1: sent to the processes, it would end launchers and data workers.
asked=
trap 'asked=1' USR1 TERM

watch_over() {
    local work=$! folder=$1 status=$1/$2 code=0
    while kill -0 "$work" 2>/dev/null; do
        if [[ $asked && -d $folder ]]; then touch -- "$folder/stop.$life"; fi
        sleep 1 &
        wait $! || true # a signal ends it early
    done
    wait "$work" || code=$?

    # Saved, and there is more to do: only what this life of the job wrote counts.
    says() { grep -qs -- "$1" "$status"; }
    if says '"state": "preempted"' && says "\"job\": \"${life%.*}\"" && says "\"restart\": ${life##*.},"; then
        # One task of an array has the number of the whole array, which would be queued again with it.
        local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
        job=${job:-$SLURM_JOB_ID}
        trap - USR1 TERM
        # Not one that somebody cancelled, nor one that SLURM queues by itself: these are ending by now.
        if [[ $(scontrol -o show job "$job") == *" JobState=RUNNING "* ]]; then
            echo "queueing job $job again"
            scontrol requeue "$job" || true # SLURM may have begun to in between
            sleep 120                       # it ends this script
        fi
    fi
    exit "$code"
}
