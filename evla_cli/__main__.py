from evla_cli.cli.main import cli

cli(prog_name="evla")
