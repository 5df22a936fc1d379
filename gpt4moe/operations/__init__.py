"""Room `operations`, storey 5: the state of the runs in a folder. No torch; nothing is written.

run_state.py    which folders are runs; running, killed, ...
run_status.py   RunStatus: all facts of each run
run_table.py    runs, and one run's account, as tables
"""
