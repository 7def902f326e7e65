// Elements of the page, made without HTML, and the frames of films.

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Hands `put` pictures of a film, evenly spread, first and last included, while they are `wanted`. Fails if it cannot be shown. */
export function frames(url, count, wanted, put) {
  const film = make("video", { src: url, muted: true, preload: "auto" });
  const seek = (time) =>
    new Promise((resolve) => {
      film.onseeked = resolve;
      film.currentTime = time;
    });
  return new Promise((resolve, reject) => {
    film.onerror = reject;
    film.onloadeddata = async () => {
      for (let i = 0; i < count && Number.isFinite(film.duration) && wanted(); i += 1) {
        const last = Math.max(0, film.duration - 0.05);
        await seek(count === 1 ? 0 : (i / (count - 1)) * last);
        const canvas = make("canvas", { height: 72, width: Math.max(1, Math.round((72 * film.videoWidth) / film.videoHeight)) });
        canvas.getContext("2d").drawImage(film, 0, 0, canvas.width, canvas.height);
        canvas.title = `${film.currentTime.toFixed(2)} s`;
        put(canvas, i);
      }
      resolve();
    };
  });
}
