// Draws tokens, in raster order and with levels from 0 to 255; those for which `isOpen(place)` holds are tinted.
const TINT = [191, 88, 0];

export function paint(canvas, model, levels, isOpen = () => false) {
  const { image_size: side, patch_size: patch, in_channels: channels, token_channels: c } = model;
  const image = new ImageData(new Uint8ClampedArray(4 * side * side).fill(255), side, side);
  levels.forEach((level, i) => {
    const place = Math.floor(i / c), across = side / patch, pixel = (i % c) % patch ** 2;
    const row = Math.floor(place / across) * patch + Math.floor(pixel / patch);
    const at = row * side + (place % across) * patch + (pixel % patch);
    for (let k = Math.floor((i % c) / patch ** 2); k < 3; k += channels)
      image.data[4 * at + k] = isOpen(place) ? TINT[k] + level * 0.25 : level;
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}
