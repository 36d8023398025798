from evla_cli.cli.main import cli

cli()
