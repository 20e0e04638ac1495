"Forecasts of series of numbers: NX-AI's TiRex and TiRex-2 on the cells and blocks of this package."
