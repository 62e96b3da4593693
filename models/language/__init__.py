"""Language models. They need the packages of requirements-llm.txt, which nothing outside this folder imports."""
