"Forecasts of series of numbers: NX-AI's TiRex on the sLSTM of this package."
