from kohaku_delta.cli import main

main(prog_name="kohaku-delta")
