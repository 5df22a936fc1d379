# shellcheck shell=bash disable=SC2154
# Records how each start of a run ended, for the next start. train.sh sources it after prologue.sh and uses it without
# `set -e`: if a full disk refuses a note, the job's log has an error, and nothing else happens.
#
#     begin_start FOLDER   sets logs; ends this job if the job before it in the chain ended so that the chain must stop
#     note_end WORD WHY    writes logs/<job>-<restart>.end: WORD, number of early ends in a row, WHY
#     warn_ranks           signals every rank to save and end, again and again until it is killed
#     count_early_ends     sets early: starts in a row, with this one, that ended before the trainer wrote a file into
#                          starts/. The trainer's own limit (resilience.max_stuck_starts) does not count them
#
# WORD: running (the shell was killed: time limit, lost node), queued (requeued), again (the next job may continue), stop.

begin_start() { # run folder
    run_folder=$1 logs=$1/logs early=0
    mkdir -p "$logs" || refuse "The run folder $run_folder cannot be made." "Set run.root to a folder with room."
    rm -f "$logs/$SLURM_JOB_ID-$restart".{end,failed}
    starts_before=$(count_starts)
    local before='' stop
    if [ "$restart" -gt 0 ]; then
        before=$logs/$SLURM_JOB_ID-$((restart - 1)).end
    elif [ -n "${GPT4MOE_CHAIN_PREVIOUS:-}" ]; then
        before=$(last_end "$GPT4MOE_CHAIN_PREVIOUS")
        stop=$(reason_to_stop "$GPT4MOE_CHAIN_PREVIOUS" "$before")
        if [ -n "$stop" ]; then
            note_end stop "$stop"
            refuse "The chain ends here: $stop." "Submit again: the run goes on from its last checkpoint."
        fi
    fi
    [ ! -s "$before" ] || read -r _ early _ <"$before"
    early_before=$early early=0
    note_end running "job $SLURM_JOB_ID was stopped"
}

note_end() { # word, why
    echo "$1 $early $2" >"$logs/$SLURM_JOB_ID-$restart.end"
}

# Repeated, because a rank that is still starting ignores the first signal.
warn_ranks() {
    while true; do
        scancel --signal=USR2 "$SLURM_JOB_ID"
        sleep 15
    done
}

count_starts() {
    find "$run_folder/starts" -name '*.yaml' 2>/dev/null | wc -l
}

count_early_ends() {
    [ "$(count_starts)" -gt "$starts_before" ] || early=$((early_before + 1))
}

last_end() { # job; prints the file of its last start, or nothing
    find "$logs" -name "$1-*.end" | sort --version-sort | tail -n 1
}

# Prints why the chain must stop after this job; nothing: the next job may continue.
reason_to_stop() { # job, its last end's file
    local state='' word='' why=''
    state=$(scontrol show job -o "$1" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [ -n "$state" ] || state=$(sacct --noheader --allocations --parsable2 --jobs="$1" --format=State 2>/dev/null)
    [ ! -s "$2" ] || read -r word _ why <"$2"
    case "$state $word" in
        CANCELLED*) echo "job $1 was cancelled" ;;
        *" stop") echo "$why" ;;
        NODE_FAIL* | BOOT_FAIL* | TIMEOUT* | PREEMPTED*) ;; # Slurm stopped it
        *" queued") echo "$why" ;;
        *" ") echo "job $1 never began to train" ;;
    esac
}
