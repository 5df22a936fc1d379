# shellcheck shell=bash disable=SC2154
# How the starts of a run ended, for the next one: sourced by train.sh after prologue.sh, and used without `set -e`: a
# note that a full disk does not take is an error in the job's log and no more.
#
#     begin_start FOLDER   sets logs; ends this job where the link of the chain before it asks for that
#     note_end WORD WHY    notes it in logs/<job>-<restart>.end: WORD, number of early ends in a row, WHY
#     warn_ranks           tells every rank to save and end, until this is killed
#     count_early_ends     sets early: starts in a row, with this one, that ended before the trainer had noted them in
#                          starts/, so that its own brake (resilience.max_stuck_starts) does not see them
#
# WORD: running (its shell was killed: time limit, lost node), queued (put back), again (a next job may go on), stop.

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

# Again and again: a rank that is only starting does not hear the first signal, and there may be no step yet.
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

last_end() { # job: the file of its last start; none: empty
    find "$logs" -name "$1-*.end" | sort --version-sort | tail -n 1
}

# Why a link of a chain should not go on after this job; empty: it should.
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
