// Elements of the page, made without HTML, and the frames of films.

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Hands `put` pictures of a film at these seconds while they are `wanted`. Fails if it cannot be shown. */
export function frames(url, times, wanted, put) {
  const film = make("video", { src: url, muted: true, preload: "auto" });
  const seek = (time) =>
    new Promise((resolve) => {
      film.requestVideoFrameCallback?.(resolve);
      film.onseeked = () => setTimeout(resolve, 300); // the same frame once more is not presented again
      film.currentTime = time + 0.001; // a frame's first moment may be rounded to the one before
    });
  return new Promise((resolve, reject) => {
    film.onerror = reject;
    film.onloadeddata = async () => {
      for (const [index, time] of times.entries()) {
        if (!wanted()) break;
        await seek(time);
        const canvas = make("canvas", { height: 72, width: Math.max(1, Math.round((72 * film.videoWidth) / film.videoHeight)) });
        canvas.getContext("2d").drawImage(film, 0, 0, canvas.width, canvas.height);
        canvas.title = `${time.toFixed(2)} s`;
        put(canvas, index);
      }
      resolve();
    };
  });
}
