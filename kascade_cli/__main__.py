from kascade_cli.app import main

main()
