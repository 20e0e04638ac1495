uint at = thread_position_in_grid.x;
y[at] = cap[0] * metal::tanh(static_cast<float>(x[at]) / cap[0]);
