from butterfly_llm.cli import main

main()
